"""`Finding`, which the host agent's doctor and the orchestrator's doctor share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from hintfleet.settings import Driver


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check by a doctor.

    :ivar name: what was checked.
    :ivar detail: what was found; if not `ok`, what is wrong.
    :ivar hint: what to do if not `ok`; may be empty.
    :ivar needed_for: the driver whose guests need it; EMBEDDED means that all guests need it.
    """

    name: str
    ok: bool
    detail: str
    hint: str = ""
    needed_for: Driver = Driver.EMBEDDED

    def needed_by(self, driver: Driver) -> bool:
        """Return whether guests of this driver need what was checked."""
        return self.needed_for in (Driver.EMBEDDED, driver)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a dict that `json.dumps` accepts."""
        return asdict(self) | {"needed_for": self.needed_for.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the finding that `as_json` converted to `data`.

        :raises TypeError: `name`, `ok` or `detail` is missing, or a field is unknown.
        :raises ValueError: `needed_for` is missing or not a driver.
        """
        return cls(**data | {"needed_for": Driver(data.get("needed_for", ""))})
