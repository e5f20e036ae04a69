"""A host agent whose guests release a batch before its ack, which breaks I1 (see in_guest/)."""

import os
from pathlib import Path

from host_agent.__main__ import main

if __name__ == "__main__":
    ours = Path(__file__).parent / "in_guest"
    os.environ["PYTHONPATH"] = f"{ours}:{os.environ.get('PYTHONPATH', '')}"
    main()
