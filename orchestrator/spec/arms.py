"""The arms of an experiment: methods with their settings. A part of the model (model.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, model_validator

from hintfleet.settings import (
    DEFAULT_BREAK_EVEN_MS,
    DEFAULT_CHUNK_ORDER,
    DEFAULT_COLD_AFTER_MS,
    DEFAULT_POLICY,
    DEFAULT_PRESSURE_PERCENT,
    DEFAULT_REPORT_PERIOD_MS,
    DEFAULT_RESERVE_PERCENT,
    DEFAULT_STEP_PERCENT,
    DEFAULT_THRESHOLD_CHUNKS,
    Driver,
    Method,
    Policy,
)
from orchestrator.spec.values import (
    BreakEvenS,
    ChunkOrder,
    ColdAfterS,
    Name,
    Part,
    ReportPeriodS,
    Size,
    Threshold,
    Values,
    WholePercent,
    invalid_value,
    key_of,
)


class Sweep(Part):
    """Values of settings, of which an arm takes every combination.

    Each field has the name of the setting in `Arm`.
    """

    chunk_order: Values[ChunkOrder] = ()
    report_period_s: Values[ReportPeriodS] = Field(default=(), alias="report_period")
    threshold_chunks: Values[Threshold] = Field(default=(), alias="threshold")

    @model_validator(mode="after")
    def _has_values(self) -> Sweep:
        if not any(self.settings.values()):
            raise invalid_value("nothing to sweep", "for example chunk_order: [9, 10]")
        return self

    @property
    def settings(self) -> dict[str, tuple[Any, ...]]:
        """The values of each setting that is swept, by its name in `Arm`."""
        every = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: values for name, values in every.items() if values}


class Swap(Part):
    """Swap of the host: a spec with swap has only one.

    :ivar zram_bytes: how much of the guests' memory can be swapped out, to compressed memory. The
        compressed memory counts into the host's memory budget.
    """

    zram_bytes: Size = Field(alias="zram")


class Arm(Part):
    """One method with its settings.

    :ivar drivers: the drivers under which the arm runs; empty for all.
    :ivar tracker, isolator: empty for that of the driver's first pair that fits
        (`hintfleet.settings.PARTS`).
    :ivar break_even_s: policy adaptive: holding a chunk back for so long costs as much as a refault
        of it.
    :ivar cold_after_s: policy cold: how long memory must have been free before it is hinted.
    :ivar pressure_above_percent: policy pressure: the share of the host's memory
        budget above which the host wants memory back.
    :ivar report_period_s: how often a guest looks for free chunks; less often at rest.
    :ivar threshold_chunks: how many new free chunks make isolator embedded hint before the period
        is over, and hugetlb begin a pass by itself; kmod does not use it.
    :ivar reserve_percent: method balloon: the share of its memory that a guest keeps free.
    :ivar step_percent: method balloon: the largest share of its memory that a guest loses at a
        time.
    :ivar sweep: the arm stands for several, one for each combination of these values.
    :ivar swap: of the host while this arm runs; None for none.
    :ivar kernel_parameters: added to the kernel command line of a real guest.
    """

    LATER = frozenset({"sweep", "swap", "break_even_s"})

    name: Name
    method: Annotated[Method, Field(strict=False)]
    drivers: tuple[Annotated[Driver, Field(strict=False)], ...] = ()
    tracker: str = ""
    isolator: str = ""
    policy: Annotated[Policy, Field(strict=False)] = DEFAULT_POLICY
    break_even_s: BreakEvenS = Field(default=DEFAULT_BREAK_EVEN_MS / 1000, alias="break_even")
    cold_after_s: ColdAfterS = Field(default=DEFAULT_COLD_AFTER_MS / 1000, alias="cold_after")
    pressure_above_percent: WholePercent = Field(
        default=DEFAULT_PRESSURE_PERCENT, alias="pressure_above"
    )
    report_period_s: ReportPeriodS = Field(
        default=DEFAULT_REPORT_PERIOD_MS / 1000, alias="report_period"
    )
    threshold_chunks: Threshold = Field(default=DEFAULT_THRESHOLD_CHUNKS, alias="threshold")
    chunk_order: ChunkOrder = DEFAULT_CHUNK_ORDER
    reserve_percent: WholePercent = Field(default=DEFAULT_RESERVE_PERCENT, alias="reserve")
    step_percent: WholePercent = Field(default=DEFAULT_STEP_PERCENT, alias="step")
    sweep: Sweep | None = None
    swap: Swap | None = None
    # Printable ASCII only: the text becomes part of the domain's XML and of the guest kernel's
    # command line.
    kernel_parameters: str = Field(default="", max_length=500, pattern=r"^[ -~]*$")

    @model_validator(mode="after")
    def _settings_fit(self) -> Arm:
        own = _SETTINGS_OF[self.method]
        others = self.model_fields_set - own - _SETTINGS_OF_ALL
        if others:
            names = ", ".join(sorted(key_of(Arm, name) for name in others))
            raise invalid_value(f"method {self.method} does not take {names}", "remove these keys")
        for name, policy in _SETTINGS_OF_POLICIES.items():
            if name in self.model_fields_set and self.policy is not policy:
                key = key_of(Arm, name)
                raise invalid_value(f"{key} needs policy {policy}, but the policy is {self.policy}")
        if self.sweep and (fixed := self.model_fields_set & self.sweep.settings.keys()):
            key = key_of(Arm, min(fixed))
            raise invalid_value(f"{key} is given, and swept, too", f"remove one of the two {key}")
        return self

    def swept(self) -> Iterator[Arm]:
        """Yield the arms that this one stands for: itself, unless it sweeps settings."""
        if self.sweep is None:
            yield self
            return
        settings = self.sweep.settings
        for values in itertools.product(*settings.values()):
            chosen = dict(zip(settings, values, strict=True))
            name = "-".join((self.name, *itertools.starmap(_part_of_name, chosen.items())))
            yield self.model_copy(update={**chosen, "name": name, "sweep": None})

    @property
    def is_control(self) -> bool:
        """Whether the arm takes no memory back and has no swap: others are compared with it."""
        return self.method is Method.NONE and self.swap is None

    def runs_under(self, driver: Driver) -> bool:
        """Return whether the arm runs under this driver."""
        return not self.drivers or driver in self.drivers


def _part_of_name(setting: str, value: float) -> str:
    """Return a swept value as a part of an arm's name: `o9`, `100ms`, `b16`."""
    if setting == "report_period_s":
        return f"{round(value * 1000)}ms"
    return f"{'o' if setting == 'chunk_order' else 'b'}{value}"


_SETTINGS_OF_ALL = {"name", "method", "drivers", "kernel_parameters", "swap"}
_SETTINGS_OF_POLICIES = {
    "break_even_s": Policy.ADAPTIVE,
    "cold_after_s": Policy.COLD,
    "pressure_above_percent": Policy.PRESSURE,
}
_SETTINGS_OF: dict[Method, set[str]] = {
    Method.NONE: set(),
    Method.HINTING: {
        "tracker",
        "isolator",
        "policy",
        "report_period_s",
        "threshold_chunks",
        "chunk_order",
        "sweep",
        *_SETTINGS_OF_POLICIES,
    },
    Method.REPORTING: set(),
    Method.BALLOON: {"reserve_percent", "step_percent"},
}
