"""The entry point of `hintfleet` and of `python -m orchestrator`."""

from __future__ import annotations

import sys
from typing import NoReturn

from hintfleet import program


def main() -> NoReturn:
    """Run a command and end the process with its exit code."""
    # Before any import that can fail: `prepare` makes stdout and stderr usable.
    tell = program.prepare("hintfleet")
    sys.exit(program.run(_command, tell, "hintfleet[orchestrator]"))


def _command() -> int:
    from orchestrator.cli import run_command  # here: it imports packages that may be missing

    return run_command(sys.argv[1:])


if __name__ == "__main__":
    main()
