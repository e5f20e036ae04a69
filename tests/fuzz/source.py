"""Bytes of the fuzzer turned into choices; when they run out, every choice is the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Source:
    """Reads choices off an input, front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Whether anything is left to read."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """At most `size` bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def number(self, size: int = 1) -> int:
        """An unsigned number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def choice(self, options: Sequence[_T]) -> _T:
        """One of the options."""
        return options[self.number() % len(options)]

    def short(self) -> bytes:
        """At most 255 bytes; their number comes first."""
        return self.take(self.number())
