"""Attached guests: running domains that somebody else made."""
