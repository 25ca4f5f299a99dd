"""The life of agents: desired state, states, operations, reconciliation."""
