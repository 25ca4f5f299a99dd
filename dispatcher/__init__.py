"""Run many instances of a single-user web application, one isolated agent per user, behind one login."""

__version__ = "0.1.0"
