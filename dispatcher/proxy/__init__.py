"""The proxy: the unprivileged daemon that faces the web, an asyncio edge and a Flask portal."""
