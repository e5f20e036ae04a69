"""Agents with planted bugs, which torture must find."""
