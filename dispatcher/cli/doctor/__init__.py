"""The checks of the command `doctor`: the machine, the providers, the installation.  They change nothing."""
