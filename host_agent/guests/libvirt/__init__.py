"""Guests that are virtual machines under QEMU and libvirt."""
