"""The memory door: how QEMU hands a guest's RAM to the host agent, and takes it back."""
