"""Agents with a fault in them on purpose, which torture must find."""
