"""The figures that a benchmark yields, and how they are printed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: a comparison, or a value of ours alone.

    :ivar ours, other: in `unit`, mostly medians of rounds; `other` is None if nothing is compared.
    :ivar ratio: ours / other, mostly the median of the rounds' ratios; None if it is not computed.
    :ivar wanted: the goal for the ratio or the figure, as text; empty if there is none.
    """

    name: str
    unit: str
    ours: float
    other: float | None = None
    ratio: float | None = None
    rounds: int = 1
    wanted: str = ""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        other = f" / {self.other:.4g}" if self.other is not None else ""
        ratio = f" = {self.ratio:.3f}" if self.ratio is not None else ""
        wanted = f"   (wanted: {self.wanted})" if self.wanted else ""
        return f"{self.name:58} {self.ours:.4g}{other} {self.unit}{ratio}{wanted}"


def side_by_side(
    name: str, unit: str, pairs: Sequence[tuple[float, float]], wanted: str = ""
) -> Figure:
    """Return a figure of medians from rounds of (ours, other): of both, and of their ratios."""
    return Figure(
        name=name,
        unit=unit,
        ours=statistics.median(ours for ours, _ in pairs),
        other=statistics.median(other for _, other in pairs),
        ratio=statistics.median(ours / other for ours, other in pairs),
        rounds=len(pairs),
        wanted=wanted,
    )
