"""The parser of the guest agent's configuration: it returns a valid value, which survives a round
trip through JSON, or raises InvalidInput."""

from __future__ import annotations

from hintfleet.agent_config import AgentConfig, Memory
from hintfleet.errors import InvalidInput
from hintfleet.settings import IsolatorKind, Method, TrackerKind
from tests.fuzz.target import Target

_SMALL = AgentConfig(server="127.0.0.1:1", guest_uuid="u", token="t")
_LARGE = AgentConfig(
    server="unix:/run/x",
    guest_uuid="5e6f",
    token="secret",
    isolator=IsolatorKind.EMBEDDED,
    tracker=TrackerKind.BITMAP,
    chunk_order=3,
    threshold_chunks=1,
    memory=Memory.EMBEDDED,
    ram_fd=3,
    memory_bytes=1 << 30,
    programs=("make", "/bin/ls"),
)


def try_input(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        config = AgentConfig.from_json(text, "fuzzed")
    except InvalidInput as error:
        str(error).encode()
        return
    assert AgentConfig.from_json(config.to_json(), "written") == config
    assert config.method in (Method.NONE, Method.HINTING)
    for name, kind in (
        (config.method, Method),
        (config.isolator, IsolatorKind),
        (config.memory, Memory),
        (config.tracker, TrackerKind),
    ):
        assert type(name) is kind
    embedded = config.isolator is IsolatorKind.EMBEDDED
    assert embedded == (config.memory is Memory.EMBEDDED)
    assert 0 <= config.chunk_order <= 10
    assert config.threshold_chunks > 0
    assert 0 <= config.memory_bytes < 1 << 52
    for said in (config.server, config.guest_uuid, config.token, *config.programs):
        said.encode()  # fails for text that protobuf could not send


TARGET = Target.of(
    try_input,
    seeds=(_SMALL.to_json().encode(), _LARGE.to_json().encode()),
    words=(
        *(f'"{name}"' for name in AgentConfig.__dataclass_fields__),
        *("hinting", "none", "hugetlb", "kmod", "embedded", "reported", "bitmap", "kernel"),
        *("true", "false", "null", "NaN", "Infinity", "-1", "1e400", "\\ud800", "\\u0000", "[[[["),
    ),
    max_bytes=1024,
    quick_runs=40_000,
)
