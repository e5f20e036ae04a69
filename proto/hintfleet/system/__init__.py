"""Files, locks, processes and resource limits of this machine."""
