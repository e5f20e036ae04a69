"""One process that runs libFuzzer, through atheris, on one target: `python -m tests.fuzz.worker
TARGET ...`.

libFuzzer reads the rest of the command line, which says whether to fuzz or to merge inputs.
tests/fuzz/run.py starts this process.
"""

from __future__ import annotations

import sys

import atheris

from tests.fuzz.target import load

_MEASURED = ["hintfleet", "guest_agent", "host_agent", "orchestrator"]
"""The packages whose branches guide the fuzzer."""

_NOT_MEASURED = ["hintfleet.v1"]


def main() -> None:
    """Run libFuzzer on the target. libFuzzer ends the process."""
    name = sys.argv[1]
    with atheris.instrument_imports(include=_MEASURED, exclude=_NOT_MEASURED):
        target = load(name)
    # For a merge, libFuzzer runs argv[0] again through a shell. So argv[0] is a whole command.
    myself = f"{sys.executable} -m {__spec__.name} {name}"
    with target.opened() as try_input:
        atheris.Setup([myself, *sys.argv[2:]], try_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
