"""Host agents and guests' agents with planted bugs, which torture must find; and a host agent that
only punches slowly (slow_punch.py)."""
