"""The database: its schema, and modules that read and write rows of agents and of sign-ins."""
