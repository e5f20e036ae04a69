"""What a crash left on a machine, as the host agent's doctor tells the orchestrator's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from hintfleet.errors import HintfleetError


@dataclass(frozen=True, kw_only=True)
class Leak:
    """One thing that nobody owns any more.

    :ivar what: such as `host agent` or `domain`.
    :ivar where: a pid, a path, a name.
    :ivar since_unix_s: when it was made, or last changed; 0 if unknown.
    :ivar size_bytes: of memory or disk, as far as it is known.
    :ivar why: how it is known to be nobody's.
    :ivar kept: why it must not be removed from here; empty if it may be.
    :ivar removed: whether it has been.
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
"""A leak, and what removes it. That raises HintfleetError or OSError if it cannot."""


def remove_all(found: Iterable[Removable]) -> list[Leak]:
    """Remove these; what could not be says why, in `kept`."""
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
