"""Addresses, gRPC channels and TLS, for all programs."""
