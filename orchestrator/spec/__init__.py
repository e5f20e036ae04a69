"""Experiment specs: reads, checks and freezes them."""
