"""Directories of agents and of the manager, safe directory trees, quotas, host user ids, free space."""
