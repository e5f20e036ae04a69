"""A host agent that runs batches of earlier epochs, which breaks I2, and batches that waited too
long."""

from host_agent.__main__ import main
from host_agent.session.gate import Gate

if __name__ == "__main__":
    Gate._why_skip = lambda *_: None  # type: ignore[method-assign]
    main()
