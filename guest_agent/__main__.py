"""`hintfleet-guest`: the guest agent's command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from threading import Thread
from typing import NoReturn

from guest_agent import agent, config
from hintfleet import __version__
from hintfleet.errors import ExitCode, HintfleetError, InvalidInput

_DESCRIPTION = """\
Find free memory of this guest, isolate it, and tell the host agent that it can have it.
The host agent writes the configuration when it makes the guest.
"""

_EPILOG = """\
examples:
  hintfleet-guest --config /sys/firmware/qemu_fw_cfg/by_name/opt/org.hintfleet/config/raw
  hintfleet-guest --config -     the first line of stdin; ends when stdin is closed,
                                 unless the configuration has orphan_after_s

exit codes: 0 stopped by SIGTERM or the end of stdin, 1 failed or refused, 2 wrong usage or
configuration, 130 interrupted
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the agent; never returns."""
    parser = argparse.ArgumentParser(
        prog="hintfleet-guest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="PATH", help="JSON; - for stdin")
    parser.add_argument(
        "--workload-only", action="store_true", help="run workloads for the host, do not hint"
    )
    parser.add_argument("--version", action="version", version=f"hintfleet-guest {__version__}")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.DONE))
    try:
        settings = config.parse(_read_config(arguments.config))
        if arguments.config == "-" and not settings.orphan_after_s:
            Thread(target=_end_with_stdin, name="lifeline", daemon=True).start()
        if arguments.workload_only:
            agent.run_workload_only(settings)
        else:
            agent.run(settings)
    except HintfleetError as error:
        print(f"hintfleet-guest: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: a workload thread inside gRPC would hold the process up.
        os._exit(error.exit_code)
    except KeyboardInterrupt:
        os._exit(ExitCode.INTERRUPTED)
    os._exit(ExitCode.DONE)


def _read_config(path: str) -> str:
    if path == "-":
        return sys.stdin.readline()
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        raise InvalidInput(f"cannot read the configuration: {error}") from error


def _end_with_stdin() -> None:
    """Whoever gave the configuration holds the other end; when it dies, so does this."""
    sys.stdin.read()
    os._exit(ExitCode.DONE)


if __name__ == "__main__":
    main()
