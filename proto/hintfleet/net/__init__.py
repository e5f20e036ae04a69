"""Addresses, channels and TLS of all programs."""
