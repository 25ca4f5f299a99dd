"""The data plane of the proxy: one asyncio process per worker; its protocol logic is kept free of I/O."""
