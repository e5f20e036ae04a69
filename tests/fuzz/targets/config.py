"""The guest agent's configuration: a frozen value that survives a round trip, or an error."""

from __future__ import annotations

from guest_agent.config import ISOLATORS, MEMORIES, METHODS, TRACKERS, Config, parse
from hintfleet.errors import InvalidInput
from tests.fuzz.target import Target

_SMALL = Config(server="127.0.0.1:1", guest_uuid="u", token="t")
_LARGE = Config(
    server="unix:/run/x",
    guest_uuid="5e6f",
    token="secret",
    isolator="embedded",
    tracker="bitmap",
    chunk_order=3,
    threshold_chunks=1,
    memory="embedded",
    ram_fd=3,
    memory_bytes=1 << 30,
)


def try_input(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        config = parse(text)
    except InvalidInput as error:
        str(error).encode()
        return
    assert parse(config.to_json()) == config
    assert config.method in METHODS
    assert config.isolator in ISOLATORS
    assert config.memory in MEMORIES
    assert config.tracker in TRACKERS
    assert 0 <= config.chunk_order <= 10
    assert config.threshold_chunks > 0
    assert 0 <= config.memory_bytes < 1 << 52
    for said in (config.server, config.guest_uuid, config.token):
        said.encode()  # they go into messages


TARGET = Target.of(
    try_input,
    seeds=(_SMALL.to_json().encode(), _LARGE.to_json().encode()),
    words=(
        *(f'"{name}"' for name in Config.__dataclass_fields__),
        *("hinting", "none", "hugetlb", "kmod", "embedded", "reported", "bitmap", "kernel"),
        *("true", "false", "null", "NaN", "Infinity", "-1", "1e400", "\\ud800", "\\u0000", "[[[["),
    ),
    max_bytes=1024,
    quick_runs=40_000,
)
