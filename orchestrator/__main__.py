"""The entry point of `hintfleet` and of `python -m orchestrator`."""

from __future__ import annotations

import sys
from typing import NoReturn

from hintfleet import program


def main() -> NoReturn:
    """Run the command of this process's command line; end the process with its exit code."""
    # `prepare` makes stdout and stderr usable, so it runs before any import that can fail.
    tell = program.prepare("hintfleet")
    sys.exit(program.run(_command, tell, "hintfleet[orchestrator]"))


def _command() -> int:
    from orchestrator.cli import run_command  # here: it imports packages that may be missing

    return run_command(sys.argv[1:])


if __name__ == "__main__":
    main()
