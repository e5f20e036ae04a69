"""`make fuzz`: fuzz interfaces that take input from outside, and report what was found."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from tests.fuzz.run import HEADING, fuzz, keep
from tests.fuzz.target import NAMES, load

_EXAMPLES = """
examples:
  python -m tests.fuzz                              all targets, a minute in all
  python -m tests.fuzz ranges spec --seconds 600    two of them, five minutes each
  python -m tests.fuzz spec --try build/fuzz/crashes/spec-crash-1f0c...
  python -m tests.fuzz --runs 100000 --keep         and keep what reached something new

Inputs that reach something new go to build/fuzz/found, findings to build/fuzz/crashes.
Exit code: 0 nothing was found, 1 something was, 2 usage.
"""


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    arguments = _arguments()
    names = arguments.target or NAMES
    if arguments.try_files:
        return _try(names, arguments.try_files)
    if importlib.util.find_spec("atheris") is None:
        print("fuzzing needs atheris\n  try: pip install atheris", file=sys.stderr)
        return 2
    failed = False
    print(HEADING)
    for name in names:
        if arguments.runs:
            result = fuzz(name, runs=arguments.runs)
        else:
            result = fuzz(name, seconds=max(1, arguments.seconds // len(names)))
        print(result, flush=True)
        for crash in result.crashes:
            print(f"  {crash}")
        if result.failed:
            failed = True
            print(result.output, file=sys.stderr)
        elif arguments.keep:
            print(f"  kept: {keep(name)}")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="*", choices=[[], *NAMES], help="default: all")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--seconds", type=int, default=60, help="in all (default: 60)")
    bound.add_argument("--runs", type=int, help="inputs for each target")
    bound.add_argument(
        "--try", dest="try_files", nargs="+", type=Path, metavar="FILE", help="feed these only"
    )
    parser.add_argument("--keep", action="store_true", help="minimise what was found and keep it")
    return parser.parse_args()


def _try(names: list[str], files: list[Path]) -> int:
    """Feed each file to each target. Return 0, or raise the exception of the first finding."""
    for name in names:
        with load(name).opened() as try_input:
            for file in files:
                try_input(file.read_bytes())
                print(f"{name}: {file}: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
