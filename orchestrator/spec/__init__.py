"""Reads and checks experiment specs; a checked spec is a frozen model."""
