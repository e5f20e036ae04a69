"""Runs trials on hosts: the plan, host agents and their clients, and records. Not Ray."""
