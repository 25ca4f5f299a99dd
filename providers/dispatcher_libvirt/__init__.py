"""The provider `libvirt`."""
