"""Agents that are processes of this host: started by a shim, their logs bounded, their exit recorded."""
