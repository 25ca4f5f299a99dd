"""Where a request goes, and what counts as use.  Pure."""
