"""What guest agent, host agent and orchestrator share; none of the three imports another.

Contents: the contract (the generated stubs in `v1`, settings, the guest agent's configuration, the
range codec, sketches, units, the error tree), what the doctors of host agent and orchestrator
report (findings, leaks), and tools for programs: logs, messages to users, `net` and `system`.
"""

__version__ = "0.1.0"
