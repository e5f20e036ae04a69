"""`make bench`: run the benchmarks, print each figure, write all of them as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

from tests.bench import (
    agent_in_guest,
    audit,
    door,
    flood,
    guest_cost,
    host_at_rest,
    host_path,
    many_hosts,
    no_regrets,
    parallel,
    real_guest,
    restart,
    sparse,
    store,
    tracker,
    working_day,
)
from tests.support import agents

_SUITES = {
    "host_path": host_path.run,
    "audit": audit.run,
    "door": door.run,
    "tracker": tracker.run,
    "sparse": sparse.run,
    "guest_cost": guest_cost.run,
    "agent_in_guest": agent_in_guest.run,
    "restart": restart.run,
    "flood": flood.run,
    "store": store.run,
    "host_at_rest": host_at_rest.run,
    "many_hosts": many_hosts.run,
    "parallel": parallel.run,
    "real_guest": real_guest.run,
    "no_regrets": no_regrets.run,
    "working_day": working_day.run,
}


def main() -> None:
    """Run the suites that the command line names, or all; print their figures, and write them to a
    JSON file."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[[], *_SUITES], help="default: all")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/bench.json"))
    arguments = parser.parse_args()
    agents.LOG_LEVEL = "warning"  # host agents' info lines would hide the figures
    figures = []
    for name in arguments.suite or _SUITES:
        print(f"{name} ...", file=sys.stderr)
        for figure in _SUITES[name]():
            print(figure, flush=True)
            figures.append({"suite": name, **figure.as_dict()})
    document = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "figures": figures,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
