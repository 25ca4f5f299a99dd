"""The life of agents: desired state, transitions, operations, reconciliation."""
