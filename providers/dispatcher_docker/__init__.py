"""The provider `docker`."""
