"""Small things that both daemons and the command line need; imports `dispatcher.plugin` alone."""
