"""The memory door: QEMU hands over a guest's RAM, and waits for running punches before it stops or
resets the guest."""
