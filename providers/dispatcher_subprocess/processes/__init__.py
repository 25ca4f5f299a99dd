"""Processes of agents: started, found again, counted and killed, with control groups where there are any."""
