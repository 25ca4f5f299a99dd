"""Agents' directories, safe directory trees, runtime directories."""
