"""A backend is a provider with its threads, its deadlines, and whether it answers; also agents' usage and logs."""
