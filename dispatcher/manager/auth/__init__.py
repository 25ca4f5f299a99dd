"""Sign-in, sessions, throttling, passwords and authenticators."""
