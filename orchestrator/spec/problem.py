"""A mistake in a spec."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

Path = tuple[Hashable, ...]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mistake in a spec.

    :ivar path: the keys and indexes that lead to the value.
    """

    path: Path
    message: str
    hint: str = ""
