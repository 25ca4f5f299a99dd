"""Output, progress and prompts."""
