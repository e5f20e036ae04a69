"""docs/logs.md has a row for each message that the programs log, and for no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("guest_agent", "host_agent", "orchestrator", "proto/hintfleet")


def messages_of(source: str) -> Iterator[str]:
    """Yield the message of each call of a method of `_log`; both messages of a call if a condition
    chooses between two."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="_log"), attr=method), args=args):
                message = args[1] if method == "log" else args[0]
                for part in ast.walk(message):
                    if isinstance(part, ast.Constant):
                        yield str(part.value)


def test_each_message_has_its_row() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    logged = {message for path in sources for message in messages_of(path.read_text())}
    rows = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/logs.md").read_text(), re.MULTILINE))
    # Other rows begin with the name of a program, such as `hintfleet-host`.
    assert logged == {row for row in rows if not row.startswith("hintfleet")}
