"""What guest agent, host agent and orchestrator share; none of the three imports another.

The contract (the generated stubs in `v1`, settings, the range codec, units, the error tree), and
tools for every program: logs, messages to users, `net` and `system`.
"""

__version__ = "0.1.0"
