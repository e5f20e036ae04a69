"""Fault injection on real host agents and on embedded, virtual and attached guests (`make
torture`)."""
