"""Guests that were there before: running domains of somebody else."""
