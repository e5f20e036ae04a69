"""`make torture`: inject faults into guests at work, for as long as you like."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import sys
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from hintfleet.errors import ExitCode
from tests.torture import embedded
from tests.torture.plan import Kind
from tests.torture.report import Report
from tests.torture.run import Setting, Until, plan_of, torture

_EPILOG = """\
examples:
  python -m tests.torture --seconds 60
  python -m tests.torture --driver libvirt --seconds 3600 -o json > hour.json
  python -m tests.torture --seed 7 --plan 20       what a run with this seed injects

exit codes: 0 no wrong page and no other problem, 1 otherwise, 2 wrong usage, 130 interrupted
"""


def main() -> None:
    """Run what the command line asks for, and exit with one of the exit codes in _EPILOG."""
    arguments = _parser().parse_args()
    seed = arguments.seed if arguments.seed is not None else secrets.randbits(32)
    with _setting(arguments, seed) as setting:
        if arguments.only:
            setting = replace(setting, kinds=dict.fromkeys(arguments.only, 1), host_kinds={})
        if arguments.pause is not None:
            setting = replace(setting, pace=replace(setting.pace, pause_s=arguments.pause))
        try:
            sys.exit(_run(arguments, setting, seed))
        except (KeyboardInterrupt, asyncio.CancelledError):
            sys.exit(ExitCode.INTERRUPTED)


def _run(arguments: argparse.Namespace, setting: Setting, seed: int) -> int:
    if arguments.plan:
        for lane, fault in plan_of(setting, seed, arguments.plan):
            print(
                f"{lane:12} {fault.pause_s:6.3f} s, {fault.moment.value}"
                f" + {fault.lag_s * 1000:.1f} ms: {fault.kind.value}, {fault.hold_s:.3f} s"
            )
        return 0
    print(f"seed {seed}, {setting.driver}: {', '.join(setting.guests)}", file=sys.stderr)
    run = torture(
        setting,
        seed,
        Until(seconds=arguments.seconds, faults=arguments.faults),
        progress=_Progress(arguments.every or (10 if arguments.seconds <= 120 else 60)),
        host_module=arguments.host_module,
    )
    report = asyncio.run(_or_sigterm(run))
    print(json.dumps(report.as_dict(), indent=2) if arguments.output == "json" else report.table())
    return 0 if report.is_well else 1


async def _or_sigterm(run: Coroutine[Any, Any, Report]) -> Report:
    """Wait for the run, and return its report. SIGTERM cancels the run, as Ctrl-C does, so that its
    guests are ended and its files removed."""
    task = asyncio.ensure_future(run)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--driver", choices=["embedded", "libvirt", "attached"], default="embedded")
    add("--seconds", type=float, default=60, help="how long faults are injected (default: 60)")
    add("--faults", type=float, default=float("inf"), help="stop sooner, with so many faults")
    add("--seed", type=int, help="of the plan and the workload (default: by chance)")
    add("--plan", type=int, default=0, metavar="N", help="print N faults of each lane and exit")
    add(
        "--every",
        type=float,
        metavar="S",
        help="how often to say how it stands (default: 10; 60 in a run of minutes)",
    )
    add("--stress", action="store_true", help="run stress-ng in real guests, too")
    add(
        "--only",
        type=_kinds,
        metavar="KINDS",
        help="inject only these kinds into guests, and none into host agents: guest_reset,link_cut",
    )
    add(
        "--pause",
        type=float,
        metavar="S",
        help="the longest pause before a fault (default: the driver's)",
    )
    add("--short", action="store_true", help="attached: one domain, which is reset seldom")
    add("-o", "--output", choices=["table", "json"], default="table")
    add("--host-module", default="tests.torture.host_without_rate_limits", help=argparse.SUPPRESS)
    return parser


def _kinds(names: str) -> list[Kind]:
    try:
        return [Kind[name.upper()] for name in names.split(",") if name]
    except KeyError as unknown:
        known = ", ".join(kind.name.lower() for kind in Kind)
        raise argparse.ArgumentTypeError(f"no kind {unknown}; kinds: {known}") from None


def _setting(arguments: argparse.Namespace, seed: int) -> AbstractContextManager[Setting]:
    if arguments.driver == "embedded":
        return nullcontext(embedded.SETTING)
    from tests.torture import attached, real  # imported late: embedded guests need neither

    if arguments.driver == "attached":
        return attached.setting(seed, short=arguments.short)
    return real.setting(seed, stress=arguments.stress)


class _Progress:
    """Called often with the report so far: prints a line of it on stderr, every `every_s` s."""

    def __init__(self, every_s: float) -> None:
        self._every_s = self._next_s = every_s

    def __call__(self, report: Report) -> None:
        if report.elapsed_s >= self._next_s:
            self._next_s += self._every_s
            print(report.line(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
