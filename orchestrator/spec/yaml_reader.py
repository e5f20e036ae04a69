"""Reads YAML into plain values, and keeps the position of each value.

Accepts a subset: no aliases, no tags, no duplicate keys, no more than 20 levels, one document. All
keys are text. Sequences become tuples, because the spec model is frozen.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.tokens import TagToken

from hintfleet.errors import InvalidInput

Path = tuple[Hashable, ...]
_MAX_DEPTH = 20
# In characters. A longer number stays text: int() takes quadratic time, and rejects more than
# 4300 digits.
_LONGEST_NUMBER = 40


@dataclass(frozen=True, kw_only=True)
class Position:
    """A position in a file; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, kw_only=True)
class Document:
    """The contents of a file, with positions.

    :ivar source: the file's name, for messages.
    :ivar positions: the position of every value, by the keys and indexes that lead to it; for a
        value in a mapping, the position of its key.
    """

    source: str
    text: str
    data: Any
    positions: dict[Path, Position] = field(repr=False)

    def position(self, path: Sequence[Hashable]) -> Position:
        """Return the position of the value at `path`, or of the nearest value around it."""
        known: Path = ()
        for step in path:
            if (*known, step) in self.positions:
                known = (*known, step)
        return self.positions[known]

    def where(self, path: Sequence[Hashable]) -> str:
        """Return `file:line:column` of `path`."""
        position = self.position(path)
        return f"{self.source}:{position.line}:{position.column}"


def read_yaml(text: str, source: str) -> Document:
    """Parse one YAML document.

    :raises InvalidInput: the text is empty, not YAML, or outside of the subset; the message names
        file, line and column.
    """
    # pure: only the composer that is written in Python has `max_depth` (ruamel/yaml/composer.py).
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = _MAX_DEPTH
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        raise _syntax_error(error, source) from error
    except ReaderError as error:
        before = text[: error.position].split("\n")
        where = f"{source}:{len(before)}:{len(before[-1]) + 1}"
        raise InvalidInput(f"{where}: not YAML: a control character") from error
    # chr() within ruamel.yaml raises ValueError or OverflowError for an escape such as
    # "\U00110000". These errors have no position, so the line is found by scanning once more.
    except (ValueError, OverflowError) as error:
        where = f"{source}:{_lines_scanned(text)}:1"
        raise InvalidInput(f"{where}: not YAML: an escape that is not a character") from error
    if node is None:
        raise InvalidInput(f"{source}:1:1: the file is empty")
    _refuse_tags(text, source)
    reader = _Reader(source)
    data = reader.value(node, ())
    return Document(source=source, text=text, data=data, positions=reader.positions)


def _refuse_tags(text: str, source: str) -> None:
    # Found in tokens, not in nodes: as nodes, `!<tag:yaml.org,2002:int> 5` and `5` have equal tags.
    for token in YAML(typ="safe", pure=True).scan(text):
        if isinstance(token, TagToken):
            where = f"{source}:{token.start_mark.line + 1}:{token.start_mark.column + 1}"
            raise InvalidInput(f"{where}: tags are not supported")


def _lines_scanned(text: str) -> int:
    """Return the line, counted from 1, on which the last token before the scan error ends."""
    line = 1
    try:
        for token in YAML(typ="safe", pure=True).scan(text):
            line = token.end_mark.line + 1
    except (ValueError, OverflowError):
        pass
    return line


def _syntax_error(error: MarkedYAMLError, source: str) -> InvalidInput:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    if isinstance(error, MaxDepthExceededError):
        return InvalidInput(f"{where}: more than {_MAX_DEPTH} levels are not supported")
    return InvalidInput(f"{where}: not YAML: {error.problem or error.context}")


class _Reader:
    def __init__(self, source: str) -> None:
        self.positions: dict[Path, Position] = {}
        self._source = source
        self._seen: set[int] = set()

    def value(self, node: Node, path: Path) -> Any:
        # ruamel.yaml composes an alias as the same node object that its anchor names. Following
        # it could loop for ever (a cycle), or grow exponentially ("billion laughs").
        if id(node) in self._seen:
            raise self._error(node, "aliases are not supported")
        self._seen.add(id(node))
        self.positions[path] = _position(node)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        return tuple(self.value(item, (*path, i)) for i, item in enumerate(node.value))

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise self._error(key_node, "a key must be a plain word")
            key = key_node.value
            if key in mapping:
                first = self.positions[(*path, key)].line
                raise self._error(key_node, f"duplicate key {key!r} (first on line {first})")
            mapping[key] = self.value(value_node, (*path, key))
            self.positions[(*path, key)] = _position(key_node)
        return mapping

    def _scalar(self, node: ScalarNode) -> Any:
        text: str = node.value
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if len(text) > _LONGEST_NUMBER:
            return text
        try:
            if kind == "int":
                return int(text.replace("_", ""), 0)
            if kind == "float":
                return float(text)
        except ValueError:
            return text
        # YAML 1.2 has only the booleans true and false; `yes` and `on` are strings.
        if kind == "bool":
            return text.lower() == "true"
        return None if kind == "null" else text

    def _error(self, node: Node, message: str) -> InvalidInput:
        at = _position(node)
        return InvalidInput(f"{self._source}:{at.line}:{at.column}: {message}")


def _position(node: Node) -> Position:
    return Position(line=node.start_mark.line + 1, column=node.start_mark.column + 1)
