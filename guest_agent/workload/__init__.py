"""The load that an experiment puts on a guest: what it does, and the memory that it uses."""
