"""The guest agent's configuration: one JSON object that the host agent makes.

The host agent converts an `AgentConfig` with `to_json`, and the guest agent reads the JSON with
`from_json`. The host agent passes the JSON to each guest that it makes. For an attached domain,
`hintfleet attach` prints the JSON, and a person puts it into the guest; with `--via guest-agent`
the host agent writes it there, through the QEMU guest agent.
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
    Driver,
    IsolatorKind,
    Method,
    TrackerKind,
)

FW_CFG_NAME = "opt/org.hintfleet/config"
"""QEMU's fw_cfg file with the configuration, in a real guest that the host agent has made."""

MOST_JSON_BYTES = 1 << 16

_REQUIRED = frozenset({"server", "guest_uuid", "token"})


class Memory(StrEnum):
    """Which memory a guest agent hints."""

    KERNEL = "kernel"
    """The memory of the machine that the agent runs on."""
    EMBEDDED = "embedded"
    """A RAM file, whose pages the agent's own buddy allocator manages."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The configuration of a guest agent.

    :ivar server: the host agent's address for guests, as users write it: `HOST:PORT`, `unix:PATH`
        or `unix-abstract:NAME`.
    :ivar tls_folder: the folder with ca.pem, cert.pem and key.pem for a server with TLS; empty
        for plain text. Not used with a unix socket, which is never encrypted.
    :ivar method: HINTING, or NONE for a guest that only runs workloads.
    :ivar isolator, tracker: a pair that `settings.PARTS` has for guests with this `memory`.
    :ivar chunk_order: log2 of the pages in a chunk.
    :ivar threshold_chunks: how many new free chunks make isolator embedded hint at once, and
        hugetlb begin a pass by itself; kmod does not use it.
    :ivar ram_fd, memory_bytes: for an embedded guest only: the descriptor of its RAM file, and
        the size of the RAM at the start.
    :ivar max_memory_bytes: the size up to which the guest may be resized; 0 if it may not.
    :ivar programs: in a guest with a kernel of its own, the programs that the workload may start:
        a command is allowed if its argv[0] is exactly one of these.
    :ivar orphan_after_s: the agent ends after so long without a link to a host agent; 0 for never.
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
    programs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """:raises InvalidInput: a value is out of its bounds, or the isolator does not allow it, or
        the memory does not allow the isolator.
        """
        for name, allowed in _ALLOWED.items():
            _check(name, getattr(self, name), allowed)
        _check("isolator", self.isolator, _isolators_of(self.memory))
        _check("tracker", self.tracker, _trackers_of(self.isolator))
        if self.isolator is IsolatorKind.HUGETLB:
            _check("chunk_order", self.chunk_order, (HUGE_PAGE_ORDER,))

    def to_json(self) -> str:
        """Return the document that `from_json` reads, on one line."""
        # json.dumps writes one line, with a space after each colon. deploy/image/init relies on
        # that: it reads `"method": "..."` with sed.
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, source: str) -> AgentConfig:
        """Read a configuration.

        A missing key has its default; `server`, `guest_uuid` and `token` must be there. If
        `tracker` is missing or empty, it is the first one in `settings.PARTS` for the isolator.

        :param source: where the text comes from, for messages: `agent configuration FILE: ...`.
        :raises InvalidInput: not a JSON object, an unknown key, a required key that is missing, or
            a value of the wrong type or out of its bounds; names the source, and the key if one
            is wrong.
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
        # JSON allows "\ud800", half of a UTF-16 pair, which cannot be encoded as UTF-8: a string
        # field of a gRPC message would refuse it later, so refuse it here.
        json.dumps(document, ensure_ascii=False).encode()
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
    given = {key: value for key, value in document.items() if (key, value) != ("tracker", "")}
    values = {name: _value(name, in_json) for name, in_json in given.items()}
    values.setdefault("tracker", _trackers_of(values.get("isolator", AgentConfig.isolator))[0])
    return values


def _value(name: str, in_json: object) -> Any:
    """Convert a field's value from JSON, where enums are text."""
    field_type = _TYPES[name]
    if name == "programs":
        return _texts(name, in_json)
    json_type = str if issubclass(field_type, StrEnum) else field_type
    # Not isinstance: in Python True is an int, but `true` in JSON is not a number.
    if type(in_json) is not json_type:
        raise InvalidInput(f"{name} must be {json_type.__name__}, not {in_json!r}")
    if name in _ALLOWED:
        _check(name, in_json, _ALLOWED[name])
    return field_type(in_json)


def _texts(name: str, in_json: object) -> tuple[str, ...]:
    if not isinstance(in_json, list) or not all(type(text) is str for text in in_json):
        raise InvalidInput(f"{name} must be a list of str, not {in_json!r}")
    return tuple(in_json)


def _check(name: str, value: object, allowed: Collection[object]) -> None:
    if value in allowed:
        return
    bounds = (
        f"{allowed[0]} to {allowed[-1]}"
        if isinstance(allowed, range)
        else " or ".join(str(one) for one in allowed)
    )
    raise InvalidInput(f"{name} is {json.dumps(value)}, must be {bounds}")


def _isolators_of(memory: Memory) -> list[IsolatorKind]:
    driver = Driver.EMBEDDED if memory is Memory.EMBEDDED else Driver.LIBVIRT
    return list(dict.fromkeys(pair.isolator for pair in PARTS[driver]))


def _trackers_of(isolator: IsolatorKind) -> list[TrackerKind]:
    pairs = (pair for of_driver in PARTS.values() for pair in of_driver)
    return [pair.tracker for pair in pairs if pair.isolator is isolator]
