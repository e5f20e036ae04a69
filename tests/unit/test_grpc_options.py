"""gRPC ignores options that it does not know, so a name with a mistake changes nothing and is not
noticed."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("proto/hintfleet", "guest_agent", "host_agent", "orchestrator", "tests")


def options() -> Iterator[str]:
    """Yield the names of all options in the code: texts like "grpc.keepalive_time_ms"."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(text, str) and re.fullmatch(r"grpc\.[a-z0-9_.]+", text):
                    yield text


def test_grpc_knows_each_option_that_is_set() -> None:
    library = Path(str(importlib.import_module("grpc._cython.cygrpc").__file__)).read_bytes()
    names = set(options())
    assert "grpc.keepalive_time_ms" in names
    assert not [name for name in names if name.encode() + b"\0" not in library]
