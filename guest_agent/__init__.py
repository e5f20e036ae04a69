"""Runs inside a guest: finds free chunks, isolates them, hints them to the host."""
