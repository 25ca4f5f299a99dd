"""Providers, contained: threads, deadlines, usage, logs."""
