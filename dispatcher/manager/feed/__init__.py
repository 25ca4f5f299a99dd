"""The feed's server: what the edge's workers are told and report."""
