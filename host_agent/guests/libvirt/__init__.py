"""The driver of guests that are virtual machines under QEMU and libvirt; attached guests use parts
of it."""
