"""The manager's REST client, for the command line and the portal."""
