"""Guests on this host: the interface of drivers, the drivers, and the peers of hinting."""
