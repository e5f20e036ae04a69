"""The agent's configuration: one JSON document that the host agent puts into the guest."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any

from hintfleet.errors import InvalidInput
from hintfleet.system.files import read_at_most

METHODS = ("none", "hinting")
MEMORIES = ("kernel", "embedded")
ISOLATORS = ("kmod", "hugetlb", "embedded")
_MOST_BYTES = 1 << 16
TRACKERS = ("", "bitmap", "reported")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the agent is to do. Every field but the first three has a default.

    :ivar server: the host agent's address, as gRPC takes it: `HOST:PORT` or `unix:PATH`, where
        PATH is percent-encoded.
    :ivar tls_folder: ca.pem, cert.pem and key.pem for a server that wants them; empty for
        plain text.
    :ivar method: `hinting`, or `none` for a guest that only runs workloads.
    :ivar isolator: `kmod`, `hugetlb` or `embedded`.
    :ivar memory: `kernel` (this machine's own) or `embedded` (a RAM file).
    :ivar ram_fd, memory_bytes: the RAM file of an embedded guest, and how much of it is
        RAM from the start.
    :ivar max_memory_bytes: what the guest may be resized to; 0 if it cannot be.
    :ivar orphan_after_s: end when the host agent was away for so long; 0 for never.
    """

    server: str
    guest_uuid: str
    token: str
    tls_folder: str = ""
    method: str = "hinting"
    isolator: str = "kmod"
    tracker: str = ""
    chunk_order: int = 9
    threshold_chunks: int = 16
    memory: str = "kernel"
    ram_fd: int = -1
    memory_bytes: int = 0
    max_memory_bytes: int = 0
    orphan_after_s: int = 0

    def to_json(self) -> str:
        """The document that `parse` reads, on one line."""
        return json.dumps(asdict(self))


def read(path: str) -> Config:
    """The configuration in a file, or on the first line of stdin (`-`).

    :raises InvalidInput: it cannot be read, or is none.
    """
    try:
        if path == "-":
            return parse(sys.stdin.readline(_MOST_BYTES))
        return parse(read_at_most(path, _MOST_BYTES).decode())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"cannot read the configuration {path}: {reason}") from error


def parse(text: str) -> Config:
    """Read a configuration.

    :raises InvalidInput: no JSON object, an unknown or a missing key, a value of
        the wrong type or out of its bounds.
    """
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode()  # no halves of UTF-16 pairs
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"agent configuration is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput("agent configuration is not a JSON object")
    known = {field.name: field for field in fields(Config)}
    if unknown := document.keys() - known.keys():
        raise InvalidInput(f"agent configuration: unknown key {min(unknown)!r}")
    if missing := {"server", "guest_uuid", "token"} - document.keys():
        raise InvalidInput(f"agent configuration: key {min(missing)!r} is missing")
    for name, value in document.items():
        _check_type(name, value, str(known[name].type))
    config = Config(**document)
    _check_values(config)
    return config


def _check_type(name: str, value: Any, wanted: str) -> None:
    if type(value).__name__ != wanted:
        raise InvalidInput(f"agent configuration: {name} must be {wanted}, not {value!r}")


def _check_values(config: Config) -> None:
    for name, value, allowed in (
        ("method", config.method, METHODS),
        ("isolator", config.isolator, ISOLATORS),
        ("memory", config.memory, MEMORIES),
        ("tracker", config.tracker, TRACKERS),
        ("chunk_order", config.chunk_order, (9,) if config.isolator == "hugetlb" else range(11)),
        ("threshold_chunks", config.threshold_chunks, range(1, 1 << 20)),
        ("orphan_after_s", config.orphan_after_s, range(1 << 20)),
        ("ram_fd", config.ram_fd, range(-1, 1 << 20)),
        ("memory_bytes", config.memory_bytes, range(1 << 52)),
    ):
        if value not in allowed:
            said = (
                f"{allowed[0]} to {allowed[-1]}"
                if isinstance(allowed, range)
                else " or ".join(str(one) for one in allowed if one)
            )
            raise InvalidInput(f"agent configuration: {name} is {value!r}, must be {said}")
