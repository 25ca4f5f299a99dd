"""Deciding on requests, without I/O: the rules, the tables they read, and the detection of use."""
