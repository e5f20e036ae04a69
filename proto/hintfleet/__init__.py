"""The contract that guest agent, host agent and orchestrator share.

Generated stubs (`hintfleet.v1`), the range codec, units and the error tree. The three parts
share only this package; none of them imports another.
"""

__version__ = "0.1.0"
