"""The feed's server: agents and sessions for the edge's workers, and the workers' reports."""
