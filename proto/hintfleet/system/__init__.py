"""Files, processes and limits of this machine."""
