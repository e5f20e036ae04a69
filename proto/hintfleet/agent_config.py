"""The guest agent's configuration: one JSON object that the host agent puts into the guest.

Both drivers build an `AgentConfig` and write it with `to_json`; the agent reads it with
`from_json`. deploy/image/init reads `"method": "..."` out of it with sed, so it stays one line
with a space after each colon.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, get_type_hints

from hintfleet.errors import InvalidInput
from hintfleet.settings import (
    DEFAULT_CHUNK_ORDER,
    DEFAULT_THRESHOLD_CHUNKS,
    HUGE_PAGE_ORDER,
    MAX_ORDER,
    MOST_THRESHOLD_CHUNKS,
    PARTS,
    IsolatorKind,
    Method,
    TrackerKind,
)

FW_CFG_NAME = "opt/org.hintfleet/config"
"""QEMU's fw_cfg file in which a real guest's agent finds its configuration."""

MOST_JSON_BYTES = 1 << 16

_REQUIRED = frozenset({"server", "guest_uuid", "token"})


class Memory(StrEnum):
    """Whose memory a guest agent deals with."""

    KERNEL = "kernel"
    """That of the machine it runs on."""
    EMBEDDED = "embedded"
    """That of a RAM file, with an allocator of its own."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What a guest agent is to do.

    :ivar server: the host agent's address, as gRPC takes it: `HOST:PORT` or `unix:PATH`, where
        PATH is percent-encoded.
    :ivar tls_folder: ca.pem, cert.pem and key.pem for a server that wants them; empty for
        plain text.
    :ivar method: HINTING, or NONE for a guest that only runs workloads.
    :ivar isolator, tracker: a pair of `settings.PARTS`.
    :ivar chunk_order: log2 of the pages in a chunk.
    :ivar threshold_chunks: free chunks that make the agent hint at once.
    :ivar ram_fd, memory_bytes: the RAM file of an embedded guest, and how much of it is
        RAM from the start.
    :ivar max_memory_bytes: what the guest may be resized to; 0 if it cannot be.
    :ivar orphan_after_s: end when the host agent was away for so long; 0 for never.
    """

    server: str
    guest_uuid: str
    token: str
    tls_folder: str = ""
    method: Method = Method.HINTING
    isolator: IsolatorKind = IsolatorKind.KMOD
    tracker: TrackerKind = TrackerKind.REPORTED
    chunk_order: int = DEFAULT_CHUNK_ORDER
    threshold_chunks: int = DEFAULT_THRESHOLD_CHUNKS
    memory: Memory = Memory.KERNEL
    ram_fd: int = -1
    memory_bytes: int = 0
    max_memory_bytes: int = 0
    orphan_after_s: int = 0

    def __post_init__(self) -> None:
        """:raises InvalidInput: a value is out of its bounds, or does not go with another."""
        for name, allowed in _ALLOWED.items():
            _check(name, getattr(self, name), allowed)
        _check("tracker", self.tracker, _trackers_of(self.isolator))
        if self.isolator is IsolatorKind.HUGETLB:
            _check("chunk_order", self.chunk_order, (HUGE_PAGE_ORDER,))

    def to_json(self) -> str:
        """Return the document that `from_json` reads, on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, source: str) -> AgentConfig:
        """Read a configuration.

        What is missing has its default; a tracker that is missing or empty is the first of
        its isolator.

        :param source: where the text is from, as in `agent configuration FILE: ...`.
        :raises InvalidInput: no JSON object, an unknown or a missing key, or a value of the
            wrong type or out of its bounds; names the key and the source.
        """
        try:
            return cls(**_values(_object(text)))
        except InvalidInput as error:
            raise InvalidInput(f"agent configuration {source}: {error.message}") from error


_TYPES: Mapping[str, type] = get_type_hints(AgentConfig)
_ALLOWED: Mapping[str, Collection[object]] = {
    "method": (Method.NONE, Method.HINTING),
    "isolator": tuple(IsolatorKind),
    "tracker": tuple(TrackerKind),
    "memory": tuple(Memory),
    "chunk_order": range(MAX_ORDER + 1),
    "threshold_chunks": range(1, MOST_THRESHOLD_CHUNKS + 1),
    "orphan_after_s": range(1 << 20),
    "ram_fd": range(-1, 1 << 20),
    "memory_bytes": range(1 << 52),
    "max_memory_bytes": range(1 << 52),
}


def _object(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False).encode()  # no halves of UTF-16 pairs
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"it is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput("it is not a JSON object")
    return document


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := document.keys() - _TYPES.keys():
        raise InvalidInput(f"unknown key {min(unknown)!r}")
    if missing := _REQUIRED - document.keys():
        raise InvalidInput(f"key {min(missing)!r} is missing")
    given = {k: said for k, said in document.items() if (k, said) != ("tracker", "")}
    values = {name: _value(name, said) for name, said in given.items()}
    values.setdefault("tracker", _trackers_of(values.get("isolator", AgentConfig.isolator))[0])
    return values


def _value(name: str, said: object) -> Any:
    """Return a field's value, of what stands for it in JSON, where names are text."""
    wanted = _TYPES[name]
    in_json = str if issubclass(wanted, StrEnum) else wanted
    if type(said) is not in_json:
        raise InvalidInput(f"{name} must be {in_json.__name__}, not {said!r}")
    if name in _ALLOWED:
        _check(name, said, _ALLOWED[name])
    return wanted(said)


def _check(name: str, value: object, allowed: Collection[object]) -> None:
    if value in allowed:
        return
    bounds = (
        f"{allowed[0]} to {allowed[-1]}"
        if isinstance(allowed, range)
        else " or ".join(str(one) for one in allowed)
    )
    raise InvalidInput(f"{name} is {json.dumps(value)}, must be {bounds}")


def _trackers_of(isolator: IsolatorKind) -> list[TrackerKind]:
    pairs = (pair for of_driver in PARTS.values() for pair in of_driver)
    return [pair.tracker for pair in pairs if pair.isolator is isolator]
