"""Fault injection on real processes and real guests (`make torture`)."""
