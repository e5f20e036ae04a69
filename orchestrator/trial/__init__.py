"""Runs trials: the plan, the hosts, the Ray actors."""
