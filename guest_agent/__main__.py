"""`hintfleet-guest`: the guest agent's command line."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from threading import Thread
from typing import NoReturn

from hintfleet import __version__, logs, program
from hintfleet.settings import ATTACHED_CONFIG_PATH

_PR_SET_THP_DISABLE = 41  # include/uapi/linux/prctl.h
_PR_THP_DISABLE_EXCEPT_ADVISED = 1 << 1

_DESCRIPTION = """\
Find free memory of this guest, isolate it, and hint it to the host agent, which takes it back.
The host agent writes the configuration when it makes the guest; `hintfleet attach` gives it for a
domain that was there before.
"""

_EPILOG = """\
examples:
  hintfleet-guest
  hintfleet-guest --config -     the first line of stdin; ends when stdin is closed,
                                 unless the configuration has orphan_after_s

exit codes: 0 stopped by SIGTERM or the end of stdin, 1 failed or refused, 2 wrong usage or
configuration, 130 interrupted
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Parse `argv`, run the agent (or only the workload), and end this process."""
    tell = program.prepare("hintfleet-guest")
    code = program.run(lambda: _run(_parser().parse_args(argv)), tell, "hintfleet")
    # Not sys.exit: the interpreter would first wait for a worker thread that runs a command of the
    # workload.
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hintfleet-guest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="PATH",
        help="JSON; - for stdin (default: what the host agent passed when it made the guest, else"
        f" {ATTACHED_CONFIG_PATH})",
    )
    parser.add_argument(
        "--workload-only",
        action="store_true",
        help="run the workload that the host asks for; do not hint",
    )
    logs.add_options(parser)
    parser.add_argument("--version", action="version", version=f"hintfleet-guest {__version__}")
    return parser


def _avoid_huge_pages() -> None:
    """Turn off transparent huge pages for this process; from Linux 6.18 on, except where it asks
    for them (madvise)."""
    # Where transparent huge pages are set to "always", the kernel gives heap and stacks whole pages
    # of 2 MiB, of which they use only a part. Such pages were up to 8 MiB of an agent's memory
    # (docs/measurements.md). Before 6.18 an embedded guest's RAM gets no huge pages either.
    prctl = ctypes.CDLL(None).prctl
    for flags in (_PR_THP_DISABLE_EXCEPT_ADVISED, 0):
        if not prctl(_PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (1, flags, 0, 0))):
            return


def _run(arguments: argparse.Namespace) -> None:
    if not arguments.workload_only:
        _avoid_huge_pages()
    # Imported after huge pages are turned off, because importing gRPC allocates most of an agent's
    # memory.
    from guest_agent import agent, config

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    settings = config.read(arguments.config or config.default_path())
    logs.configure(arguments.log_level, arguments.log_format, guest=settings.guest_uuid)
    if arguments.config == "-" and not settings.orphan_after_s:
        Thread(target=_end_with_stdin, name="lifeline", daemon=True).start()
    if arguments.workload_only:
        agent.run_workload_only(settings)
    else:
        agent.run(settings)


def _end_with_stdin() -> None:
    """End this process when stdin is closed.

    The host agent that wrote the configuration to stdin keeps the pipe open for as long as it runs.
    """
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
