"""`hintfleet-host`: the host agent's command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import resource
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# Modules that need gRPC are imported inside functions: the import takes long, and until
# `program.prepare` has run, Ctrl-C shows a traceback.
from hintfleet import __version__, logs, program
from hintfleet.settings import DEFAULT_ORPHAN_AFTER_S, DEFAULT_WATCH_GRACE_S, Driver

if TYPE_CHECKING:
    from host_agent.server import Settings

_log = logging.getLogger("hintfleet.host")

_DESCRIPTION = """\
Make guests, reclaim the memory that they hint, keep the books and serve the control API.
"""

_EPILOG = """\
examples:
  hintfleet-host                                   serve on a unix socket in the runtime folder
  hintfleet-host --listen unix:/run/hintfleet/host.sock --memory-budget 16GiB
  hintfleet-host --listen 192.0.2.7:7070 --tls /etc/hintfleet/tls
  hintfleet-host --state /var/lib/hintfleet        guests outlive a crash or restart of it
  hintfleet-host --doctor                          what this host can run, as JSON

environment: LIBVIRT_DEFAULT_URI, XDG_RUNTIME_DIR, HINTFLEET_IMAGE_DIR
exit codes: 0 stopped, 1 failed, 2 wrong usage, 130 interrupted before it served
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, and exit with its exit code.

    Without --doctor, --leaks and --clean: serve until SIGTERM, SIGINT, end of file on
    --lifeline-fd, or a bug that ends one of the host agent's loops. Then end all guests, but only
    detach the attached ones; with --state, do that only after end of file. A signal while the
    guests of an earlier host agent are adopted ends this process at once.
    """
    tell = program.prepare("hintfleet-host")
    sys.exit(program.run(lambda: _run(_parser().parse_args(argv)), tell, "hintfleet[host]"))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.doctor:
        # Imported here, so that `program.run` reports a module that cannot be imported.
        from host_agent.doctor import examine

        findings = [finding.as_json() for finding in examine(arguments.libvirt_uri)]
        print(json.dumps(findings, indent=2))
    elif arguments.leaks or arguments.clean:
        print(json.dumps(_leaks(arguments), indent=2))
    else:
        logs.configure(arguments.log_level, arguments.log_format, host=arguments.name)
        asyncio.run(_serve(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hintfleet-host",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_addresses(parser.add_argument)
    _add_guests_and_state(parser.add_argument)
    add = parser.add_argument
    add("--metrics", default="", metavar="ADDR", help="serve Prometheus metrics on HOST:PORT")
    add(
        "--tls",
        metavar="FOLDER",
        help="use TLS with this host's certificate where --listen and --metrics are TCP, and"
        " accept operators only (see `hintfleet pki`); required off loopback",
    )
    add(
        "--guest-tls",
        metavar="FOLDER",
        help="use TLS for --guest-listen; each guest shows its own certificate and its token",
    )
    add("--ready-fd", type=int, metavar="FD", help="write the addresses here as JSON when serving")
    add("--lifeline-fd", type=int, metavar="FD", help="stop at end of file on this descriptor")
    add("--doctor", action="store_true", help="print what this host can run, as JSON, and exit")
    add("--leaks", action="store_true", help="print what a crash left on this host, as JSON")
    add("--clean", action="store_true", help="remove what --leaks finds, and print it")
    logs.add_options(parser)
    add("--version", action="version", version=f"hintfleet-host {__version__}")
    return parser


def _add_addresses(add: Callable[..., argparse.Action]) -> None:
    from hintfleet.net.addresses import default_control_address

    add("--name", default=platform.node(), help="name of this host (default: %(default)s)")
    add(
        "--listen",
        default=default_control_address(),
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
        "--guest-advertise",
        default="",
        metavar="ADDR",
        help="address that guests are told, if it differs from where the agent listens: behind"
        " NAT or a proxy (for every guest, embedded ones too)",
    )


def _absolute(path: str) -> Path:
    # For --state: libvirt and QEMU are given paths in it, and have other working directories.
    return Path(path).absolute()


def _add_guests_and_state(add: Callable[..., argparse.Action]) -> None:
    add(
        "--memory-budget",
        type=_size,
        default=0,
        metavar="SIZE",
        help="memory that guests may use together (default: all that the machine"
        " and the cgroups above this process allow)",
    )
    add(
        "--enforce-budget",
        choices=[driver.value for driver in Driver],
        metavar="DRIVER",
        help="put guests of this driver (embedded, libvirt) into a memory cgroup with the budget"
        " as its limit, if one can be made here: the kernel kills one of them when they need more",
    )
    add(
        "--libvirt-uri",
        default=os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system"),
        metavar="URI",
        help="where libvirt guests are made (default: %(default)s)",
    )
    add(
        "--state",
        type=_absolute,
        metavar="DIR",
        help="keep here what guests need to outlive this agent; without --state, they end with it",
    )
    add(
        "--orphan-after",
        type=_seconds,
        default=DEFAULT_ORPHAN_AFTER_S,
        metavar="S",
        help="with --state: a guest ends when it had no host agent for S seconds"
        " (default: %(default)s)",
    )
    add(
        "--watch-grace",
        type=_seconds,
        default=DEFAULT_WATCH_GRACE_S,
        metavar="S",
        help="with --state: adopted guests end when no Watch of their trial is open after S"
        " seconds (default: %(default)s); until then, other trials wait",
    )


def _size(text: str) -> int:
    from hintfleet.errors import InvalidInput
    from hintfleet.units import parse_size

    try:
        return parse_size(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> int:
    """:raises argparse.ArgumentTypeError: it is none, or beyond what a guest's agent takes
    (`hintfleet.agent_config`)."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 20:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds from 1 to {(1 << 20) - 1}"
        )
    return int(text)


def _leaks(arguments: argparse.Namespace) -> dict[str, Any]:
    from hintfleet.leaks import remove_all
    from host_agent.leaks import find

    found, unseen = find(arguments.libvirt_uri)
    leaks = remove_all(found) if arguments.clean else [leak for leak, _ in found]
    return {"leaks": [leak.as_json() for leak in leaks], "not_looked_at": unseen}


async def _serve(arguments: argparse.Namespace) -> None:
    from hintfleet.errors import Refused
    from hintfleet.net.addresses import SHARED_FOLDER, default_control_address, socket_path
    from host_agent.api.metrics import serve_metrics
    from host_agent.server import serving
    from host_agent.threads import keep_latency_steady

    if socket := socket_path(arguments.listen):
        folder = socket.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(
                f"cannot make the socket's folder {folder}: {error.strerror}",
                hint="choose another --listen unix:PATH",
            ) from error
        if arguments.listen == default_control_address():
            _refuse_if_not_ours(folder, SHARED_FOLDER)
    keep_latency_steady()
    # Raise the soft limit of open files to the hard one: guests and connections take descriptors.
    # The soft limit is low by default (1024) only because select(2) fails above it; this program
    # uses epoll and poll.
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    stop = asyncio.Event()
    parent_gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    _on_signals(_end_at_once if arguments.state else stop.set)
    if arguments.lifeline_fd is not None:
        loop.add_reader(
            arguments.lifeline_fd, _read_lifeline, arguments.lifeline_fd, parent_gone, stop
        )
    settings = _settings(arguments)
    async with serving(settings) as served:
        _on_signals(stop.set)
        with serve_metrics(arguments.metrics, served.registry, settings.name, settings.tls):
            ready = json.dumps({"control": served.control, "guest": served.guest})
            if arguments.ready_fd is not None:
                os.write(arguments.ready_fd, ready.encode() + b"\n")
                os.close(arguments.ready_fd)
            addresses = {"control": served.control, "guests_at": served.guest}
            _log.info("serving", extra=logs.fields(**addresses, version=__version__))
            await _until_stopped(stop, served.failure)
            # The guests were made for the parent. If it is gone, nobody needs them any more: end
            # them even with --state.
            if parent_gone.is_set():
                served.registry.shutting_down = True
                await served.registry.end_all()


def _on_signals(do: Callable[[], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, do)


def _end_at_once() -> None:
    """End this process, which adopts guests and does not serve yet, as if it were killed."""
    # The adoption may wait in libvirt's calls, which cannot be cancelled, and for two minutes until
    # a suspended guest opens its memory door. The state is as the earlier host agent left it. Its
    # lock must not be released while such a call can change a guest: the kernel releases it when
    # all threads have ended.
    _log.info("ended before all guests were adopted")
    os._exit(0)


def _settings(arguments: argparse.Namespace) -> Settings:
    from hintfleet.errors import InvalidInput
    from hintfleet.net.tls import Tls
    from hintfleet.system.machine_limits import total_memory
    from host_agent.server import Settings

    if arguments.enforce_budget and arguments.state:
        # With --state, guests outlive this host agent, but it removes its cgroup when it ends.
        raise InvalidInput("--enforce-budget does not work with --state", hint="leave one out")
    return Settings(
        name=arguments.name,
        listen=arguments.listen,
        guest_listen=arguments.guest_listen,
        guest_advertise=arguments.guest_advertise,
        memory_budget_bytes=arguments.memory_budget or total_memory().value,
        enforce_budget=Driver(arguments.enforce_budget) if arguments.enforce_budget else None,
        libvirt_uri=arguments.libvirt_uri,
        tls=Tls.read(arguments.tls, server=True) if arguments.tls else None,
        guest_tls=Tls.read(arguments.guest_tls, server=True) if arguments.guest_tls else None,
        state=arguments.state,
        orphan_after_s=arguments.orphan_after,
        watch_grace_s=arguments.watch_grace,
    )


async def _until_stopped(stop: asyncio.Event, failure: asyncio.Future[None]) -> None:
    failure.add_done_callback(lambda _: stop.set())
    await stop.wait()
    if failure.done():
        failure.result()


def _read_lifeline(fd: int, *events: asyncio.Event) -> None:
    """Read from the lifeline, which has data or is at end of file. At end of file, set `events`."""
    if not os.read(fd, 1024):
        # epoll reports end of file again and again until the descriptor is removed.
        asyncio.get_running_loop().remove_reader(fd)
        for event in events:
            event.set()


def _refuse_if_not_ours(folder: Path, shared: Path) -> None:
    """Refuse a socket folder of another user, who could replace the socket in it.

    Check `folder` and the folders above it, but only those below `shared`, where every user may
    make folders. Deny other users access to each folder that is checked (mode 0700).

    :raises Refused: a folder that is checked is another user's, or no folder.
    """
    from hintfleet.errors import Refused

    for path in (folder, *folder.parents):
        if shared not in path.parents:
            return
        status = path.lstat()  # not stat: the owner of a link could change its target
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise Refused(
                f"{path} is not a folder of this user", hint="choose another --listen unix:PATH"
            )
        path.chmod(0o700)


if __name__ == "__main__":
    main()
