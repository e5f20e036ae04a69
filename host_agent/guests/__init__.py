"""Guests on this host: the driver protocol, its two drivers, and the peers of hinting."""
