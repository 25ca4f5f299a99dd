"""The manager: the privileged daemon that owns users, agents, providers and state.  Never faces the web."""
