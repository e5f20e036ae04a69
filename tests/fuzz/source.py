"""Turns bytes of the fuzzer into choices, numbers and shorter byte strings. When no bytes are left,
every choice is the first option, every number is 0, and every byte string is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Source:
    """Reads choices from an input, from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Return whether anything is left to read."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def number(self, size: int = 1) -> int:
        """Read an unsigned number of `size` bytes, little-endian; missing bytes are 0."""
        return int.from_bytes(self.take(size), "little")

    def choice(self, options: Sequence[_T]) -> _T:
        """Read a byte, and return the option that it selects."""
        return options[self.number() % len(options)]

    def short(self) -> bytes:
        """Read a byte with a length, then so many bytes, or fewer if no more are left."""
        return self.take(self.number())
