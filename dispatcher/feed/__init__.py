"""The protocol between the manager and the edge, shared by both."""
