"""The spec parser: for any text it returns a frozen model, or raises an error that names file, line
and column."""

from __future__ import annotations

import re
from contextlib import suppress

from hintfleet.errors import InvalidInput
from orchestrator.spec import catalogue, memory_needs
from orchestrator.spec import checks as spec_checks
from orchestrator.spec.file import parse
from orchestrator.spec.model import Spec, describe
from orchestrator.spec.workload import steps_of
from tests.fuzz.target import Target

_SOURCE = "fuzz.yaml"
_WHERE = re.compile(rf"^{_SOURCE}:(\d+):(\d+): ")
_MOST_STEPS = 100_000

_SMALL = b"""name: a
driver: embedded
hosts: {count: 2, memory: 1GiB}
guests: {per_host: 3, memory: 512MiB}
workload: {phases: [{allocate: 384MiB, for: 2s}, {free: 75%, for: 3s}, {repeat: 2}]}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap, policy: cold, cold_after: 1s}
repetitions: 3
seed: 1
"""
_AGENTS = b"""name: b
driver: libvirt
hosts: {agents: ['127.0.0.1:50051', {address: 'unix:/run/x', node: n1}]}
guests: {per_host: 1, memory: 1GiB}
workload: {phases: [{allocate: 50%}, {free: 100%, settle: true}, {replay: r, speed: 2}]}
recordings: [{name: r, time_s: [0, 1.5], used_bytes: [4096, 0]}]
arms:
  - {name: none, method: none}
  - {name: b, method: balloon, reserve: 10%, step: 5%, kernel_parameters: init_on_alloc=0}
under: {embedded: {hosts: {count: 1, memory: 1GiB}}}
timeouts: {connect: 1min, nodes: 5min}
"""
_SWITCHBACK = b"""name: c
driver: libvirt
hosts: {agents: ['127.0.0.1:50051']}
switchback: {guests: [vm1, vm2], shortest: 5min, longest: 15min, cut: 2min}
arms:
  - {name: off, method: none}
  - {name: on, method: hinting}
"""

# The fuzzer would hardly ever make these inputs from a valid spec; each once crashed the parser.
_BOMBS = (
    _SMALL.replace(b"{repeat: 2}", b"{repeat: 10000}, {repeat: 10000}, {repeat: 10000}"),
    _SMALL.replace(b"seed: 1", b"seed: " + b"[" * 500),
    _SMALL.replace(b"seed: 1", b"seed: 0x" + b"f" * 1000),
    b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c]\n" % (n, n, n - 1, n - 1) for n in b"bcdefghijklmnopqrstuvwx"),
)


def try_input(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        spec = parse(text, _SOURCE).spec
    except InvalidInput as error:
        _says_where(error, text)
        return
    _can_be_used(spec)


def _says_where(error: InvalidInput, text: str) -> None:
    """Check that the error names the file, a line of the text (or the one after its last) and a
    column, and can be encoded as UTF-8."""
    str(error).encode()
    where = _WHERE.match(error.message)
    assert where, error.message
    assert 1 <= int(where[1]) <= len(re.split("\r\n|[\n\r\x85\u2028\u2029]", text)) + 1
    assert int(where[2]) >= 1


def _can_be_used(spec: Spec) -> None:
    """Check that an accepted spec is frozen and bounded, and has no problem that the checks
    find."""
    hash(spec)
    assert describe(spec).encode()
    for one in spec.classes:
        assert len(steps_of(spec, one)) <= _MOST_STEPS
    assert not list(spec_checks.problems(spec))
    assert memory_needs.needed_bytes(spec) > 0
    with suppress(AttributeError, TypeError, ValueError):  # pydantic raises one of these
        spec.name = "changed"
        raise AssertionError("a spec can be changed")


TARGET = Target.of(
    try_input,
    seeds=(
        _SMALL,
        _AGENTS,
        _SWITCHBACK,
        *_BOMBS,
        *(catalogue.text(name).encode() for name in catalogue.names()),
    ),
    words=(
        *("name:", "driver:", "hosts:", "guests:", "workload:", "phases:", "arms:", "under:"),
        *("precision:", "max_repetitions:"),
        *("timeouts:", "repetitions:", "seed:", "count:", "memory:", "agents:", "per_host:"),
        *("address:", "node:", "nodes:"),
        *("switchback:", "shortest:", "longest:", "cut:", "all"),
        *(
            "churn:",
            "fault:",
            "bandwidth:",
            "pause:",
            "fragments:",
            "read:",
            "drop_caches:",
            "command:",
            "replay:",
            "sweep:",
            "stagger:",
            "speed:",
            "recordings:",
            "time_s:",
            "used_bytes:",
        ),
        *("allocate:", "free:", "repeat:", "for:", "settle:", "method:", "tracker:", "policy:"),
        *("isolator:", "threshold:", "chunk_order:", "cold_after:", "reserve:", "step:"),
        *("embedded", "libvirt", "hinting", "reporting", "balloon", "bitmap", "pressure"),
        *("&a", "*a", "<<: ", "!!int", "!!python/object:", "---\n", "...\n", "%YAML 1.1\n", "? "),
        *("{", "}", "[", "]", "- ", "|\n", ">-\n", "'", '"', "\\x", "0x", "1e999", ".inf", ".nan"),
        *("GiB", "MiB", "GB", "100%", "1h", "10000", "\u2028", "\ufeff", "\x00", "\x85"),
    ),
    max_bytes=2048,
    quick_runs=1_000,
)
