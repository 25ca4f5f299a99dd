"""Small things that several parts need; imports nothing else of the project."""
