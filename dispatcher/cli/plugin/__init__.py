"""`dispatcher plugin new` and `dispatcher plugin check`."""
