"""Disks of machines: images, data disks, the cloud-init disk, and the sandbox in which their content is read."""
