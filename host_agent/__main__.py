"""`hintfleet-host`: the host agent's command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hintfleet import __version__
from hintfleet.errors import ExitCode, HintfleetError, InvalidInput
from hintfleet.units import parse_size

_DESCRIPTION = """\
Make guests, reclaim the memory that they hint, keep the books, and serve the control API.
"""

_EPILOG = """\
examples:
  hintfleet-host                                   serve on a unix socket in the runtime folder
  hintfleet-host --listen unix:/run/hintfleet/host.sock --memory-budget 16GiB
  hintfleet-host --doctor                          what this host can run, as JSON

environment: LIBVIRT_DEFAULT_URI, XDG_RUNTIME_DIR, HINTFLEET_IMAGE_DIR
exit codes: 0 stopped, 1 failed, 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM, SIGINT or the end of --lifeline-fd."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.doctor:
            # Late: a doctor must be able to tell that something cannot be imported.
            from host_agent.doctor import examine

            print(json.dumps(examine(arguments.libvirt_uri), indent=2))
        else:
            asyncio.run(_serve(arguments))
    except HintfleetError as error:
        print(f"hintfleet-host: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ImportError as error:
        print(f"hintfleet-host: {error}\n  try: pip install 'hintfleet[host]'", file=sys.stderr)
        sys.exit(ExitCode.FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hintfleet-host",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--name", default=platform.node(), help="name of this host (default: %(default)s)")
    add(
        "--listen",
        default=_default_socket(),
        metavar="ADDR",
        help="control API (default: %(default)s)",
    )
    add(
        "--guest-listen",
        default="127.0.0.1:0",
        metavar="ADDR",
        help="where virtual machines reach this agent (default: %(default)s, 0 picks a port)",
    )
    add(
        "--memory-budget",
        type=_size,
        default=0,
        metavar="SIZE",
        help="memory that guests may use together (default: all of this machine's)",
    )
    add(
        "--libvirt-uri",
        default=os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system"),
        metavar="URI",
        help="where libvirt guests are made (default: %(default)s)",
    )
    add("--metrics", default="", metavar="ADDR", help="serve Prometheus metrics on HOST:PORT")
    add("--ready-fd", type=int, metavar="FD", help="write the addresses here as JSON when serving")
    add("--lifeline-fd", type=int, metavar="FD", help="stop when this reads end of file")
    add("--doctor", action="store_true", help="print what this host can run, as JSON, and exit")
    add("--version", action="version", version=f"hintfleet-host {__version__}")
    return parser


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _default_socket() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR") or (
        "/run" if os.geteuid() == 0 else f"/tmp/hintfleet-{os.geteuid()}"  # noqa: S108
    )
    return f"unix:{Path(runtime) / 'hintfleet' / 'host.sock'}"


async def _serve(arguments: argparse.Namespace) -> None:
    from host_agent.metrics import serve_metrics
    from host_agent.server import Settings, serving

    if arguments.listen.startswith("unix:"):
        folder = Path(arguments.listen.removeprefix("unix:")).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.lifeline_fd is not None:
        loop.add_reader(arguments.lifeline_fd, stop.set)
    settings = Settings(
        name=arguments.name,
        listen=arguments.listen,
        guest_listen=arguments.guest_listen,
        memory_budget_bytes=arguments.memory_budget or _physical_bytes(),
        libvirt_uri=arguments.libvirt_uri,
    )
    async with serving(settings) as served:
        with serve_metrics(arguments.metrics, served.registry):
            ready = json.dumps({"control": served.control, "guest": served.guest})
            if arguments.ready_fd is not None:
                os.write(arguments.ready_fd, ready.encode() + b"\n")
                os.close(arguments.ready_fd)
            else:
                print(f"hintfleet-host {__version__}: serving on {served.control}", file=sys.stderr)
            await stop.wait()


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
