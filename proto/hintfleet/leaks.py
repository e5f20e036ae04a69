"""Things that a crash left on a machine; the host agent's doctor reports them as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from hintfleet.errors import HintfleetError


@dataclass(frozen=True, kw_only=True)
class Leak:
    """One thing that nobody owns any more.

    :ivar what: its kind, for example `host agent` or `domain`.
    :ivar where: a pid, a path or a name.
    :ivar since_unix_s: when it was made, or last changed; 0 if unknown.
    :ivar size_bytes: memory or disk that it uses, as far as known.
    :ivar why: how we know that nobody owns it.
    :ivar kept: why it was not, or must not be, removed; empty if it may be.
    :ivar removed: whether it was removed.
    """

    what: str
    where: str
    since_unix_s: int
    size_bytes: int
    why: str
    kept: str = ""
    removed: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object with the fields as keys."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the leak that `as_json` made this of.

        :raises TypeError: a field is missing or unknown.
        """
        return cls(**data)


Removable = tuple[Leak, Callable[[], None]]
"""A leak, and the function that removes it, or raises HintfleetError or OSError."""


def remove_all(found: Iterable[Removable]) -> list[Leak]:
    """Remove all leaks but those with `kept` set, and return all. `kept` of a leak that cannot be
    removed says why."""
    return [_removed(leak, remove) for leak, remove in found]


def _removed(leak: Leak, remove: Callable[[], None]) -> Leak:
    if leak.kept:
        return leak
    try:
        remove()
    except HintfleetError as error:
        return replace(leak, kept=error.message)
    except OSError as error:
        return replace(leak, kept=str(error))
    return replace(leak, removed=True)
