"""`Leak`: a thing that a crash left on a machine. `remove_all` removes such things.

`hintfleet-host --leaks` prints as JSON what killed host agents left; `--clean` also removes it.
`hintfleet doctor --leaks` and `--clean` run that command, and add what killed runs left, and the
huge pages of a dead guest agent, which are only listed.
"""

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
    :ivar kept: why it was not removed or must not be removed; otherwise empty.
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
        """Return the leak that `as_json` converted to `data`.

        :raises TypeError: a field without a default is missing, or a field is unknown.
        """
        return cls(**data)


Removable = tuple[Leak, Callable[[], None]]
"""A leak, and the function that removes it; it raises HintfleetError or OSError if it cannot."""


def remove_all(found: Iterable[Removable]) -> list[Leak]:
    """Remove all leaks except those that have `kept` set; return all of them, in the same order.

    Each leak that was removed has `removed` set. If the removal of a leak failed, its `kept` is the
    reason.
    """
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
