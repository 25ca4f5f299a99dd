"""The provider `subprocess`."""
