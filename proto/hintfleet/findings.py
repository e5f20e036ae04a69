"""What a doctor finds, in the words that the host agent's and the orchestrator's share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from hintfleet.settings import Driver


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a doctor has looked at.

    :ivar detail: what was found; where it is not ok, what is wrong.
    :ivar hint: what to do where it is not ok; may be empty.
    :ivar needed_for: the driver that cannot do without: EMBEDDED stands for every driver.
    """

    name: str
    ok: bool
    detail: str
    hint: str = ""
    needed_for: Driver = Driver.EMBEDDED

    def needed_by(self, driver: Driver) -> bool:
        """Return whether guests of this driver need it."""
        return self.needed_for in (Driver.EMBEDDED, driver)

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object with the fields as keys."""
        return asdict(self) | {"needed_for": self.needed_for.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the finding that `as_json` made this of.

        :raises TypeError: a field is missing or unknown.
        :raises ValueError: there is no such driver, or none is named.
        """
        return cls(**data | {"needed_for": Driver(data.get("needed_for", ""))})
