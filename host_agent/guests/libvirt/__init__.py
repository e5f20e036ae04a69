"""The driver of guests that are virtual machines under QEMU and libvirt."""
