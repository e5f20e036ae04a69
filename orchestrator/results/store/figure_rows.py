"""Converts rows of the database into figures and records."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from hintfleet.sketch import Sketch
from orchestrator.results.capacity import Capacity, CapacityRow
from orchestrator.results.comparison import CostRow
from orchestrator.results.cost import Cost
from orchestrator.results.footprint import Footprint, Returned
from orchestrator.results.loops import LoopSum
from orchestrator.results.precision import Precision
from orchestrator.results.savings import FootprintRow
from orchestrator.trial.records import LoopFigures

# The fleet service reads the same rows for each query: what is decoded from their texts is kept.
_remembered = lru_cache(maxsize=1 << 15)


@_remembered
def precision(stored: str) -> Precision | None:
    """Return a run's stored precision; None if it has none."""
    values = json.loads(stored)
    return Precision(**values) if values else None


def _first_look(row: sqlite3.Row) -> int:
    wanted = precision(row["precision"])
    return wanted.least_repetitions if wanted else 0


def footprint_rows(
    trials: Sequence[sqlite3.Row], figures: Sequence[sqlite3.Row]
) -> list[FootprintRow]:
    """Return a row for each trial and each host (or guest) that has figures in the trial's run; one
    row for each trial of a run without figures.

    A trial that was cut off has no figures, but it has these rows, too: without them, its arm would
    be compared by its other trials alone. In a switchback, a guest has no row for a block that was
    done without it.

    :param figures: of all attempts at trials of these runs.
    """
    texts: dict[tuple[str, str, str], str | None] = {}
    units: dict[str, set[tuple[str, str]]] = {}
    for run_id, trial_id, host, guest, text in figures:
        texts[trial_id, host, guest] = text
        units.setdefault(run_id, set()).add((host, guest))
    rows = []
    for trial in trials:
        of_trial = partial(
            FootprintRow,
            run_id=trial["run_id"],
            experiment=trial["name"],
            spec_hash=trial["spec_hash"],
            arm=trial["arm"],
            is_control=trial["arm"] == trial["control"],
            repetition=trial["repetition"],
            undecided=trial["undecided"],
            lost=bool(trial["lost"]),
            first_look=_first_look(trial),
            left_out=bool(trial["left_out"]),
        )
        for host, guest in sorted(units.get(trial["run_id"], {("", "")})):
            if guest and trial["is_whole_block"] and (trial["trial_id"], host, guest) not in texts:
                continue  # a guest that was attached later, or detached before
            text = texts.get((trial["trial_id"], host, guest))
            footprint = _footprint(text) if text else None
            rows.append(of_trial(host=host, guest=guest, footprint=footprint))
    return rows


def cost_row(row: sqlite3.Row) -> CostRow:
    """Convert a row of the query in `Store.cost_rows`."""
    return CostRow(
        **_of_host(row),
        cost=_cost(json.loads(row["cost"], object_hook=_with_sketches)) if row["cost"] else None,
        first_look=_first_look(row),
        left_out=bool(row["left_out"]),
    )


def capacity_row(row: sqlite3.Row) -> CapacityRow:
    """Convert a row of the query in `Store.capacity_rows`."""
    return CapacityRow(
        **_of_host(row),
        capacity=Capacity(**json.loads(row["capacity"])) if row["capacity"] else None,
    )


def _of_host(row: sqlite3.Row) -> dict[str, Any]:
    """Return the fields that CostRow and CapacityRow have in common."""
    return {
        "arm": row["arm"],
        "is_control": row["arm"] == row["control"],
        "repetition": row["repetition"],
        "host": row["host"],
        "undecided": row["undecided"],
    }


def _cost(stored: dict[str, Any]) -> Cost:
    lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
    loops = tuple(LoopSum(**one) for one in stored.get("loops", ()))
    return Cost(**stored | lists | {"loops": loops})


def event_values(detail: str) -> dict[str, Any]:
    """Return the values of a stored event, by field."""
    stored: dict[str, Any] = json.loads(detail, object_hook=_with_sketches)
    return stored | {"loop": LoopFigures(**stored["loop"])} if stored.get("loop") else stored


def _with_sketches(stored: dict[str, Any]) -> dict[str, Any] | Sketch:
    if stored.keys() != {"first_bucket", "counts"}:
        return stored
    return Sketch(first_bucket=stored["first_bucket"], counts=tuple(stored["counts"]))


@_remembered
def _footprint(text: str) -> Footprint:
    stored = json.loads(text)
    returned = stored.pop("returned")
    return Footprint(**stored, returned=Returned(**returned) if returned else None)
