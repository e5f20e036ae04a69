"""Stubs generated from hinting.proto, host.proto and fleet.proto (`make proto`)."""
