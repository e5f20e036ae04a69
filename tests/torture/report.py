"""Reports what a run did and found, and whether it passed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from hintfleet.units import GIB, format_size
from hintfleet.v1 import host_pb2
from tests.torture.plan import Kind

_MOST_PROBLEMS = 50


@dataclass(kw_only=True)
class Report:
    """Counts of a run.

    :ivar problems: what happened and must not happen, with details for finding the cause: for
        example wrong pages, a guest that ended though nobody had killed it, books that do not
        balance, a process that was left behind.
    :ivar missed: faults that were not injected, because the victim was gone, a call failed, or they
        were refused (memory in use cannot be unplugged); not in `faults`.
    """

    driver: str
    seed: int
    guest_count: int
    elapsed_s: float = 0.0
    faults: Counter[Kind] = field(default_factory=Counter)
    missed: int = 0
    verified_pages: int = 0
    wrong_pages: int = 0
    steps: int = 0
    steps_without_answer: int = 0
    guests_made: int = 0
    connections: int = 0
    impostors_refused: int = 0
    stress_rounds: int = 0
    problems: list[str] = field(default_factory=list)
    _books: dict[str, host_pb2.Ledger] = field(default_factory=dict)

    @property
    def fault_count(self) -> int:
        return self.faults.total()

    @property
    def is_well(self) -> bool:
        return not self.wrong_pages and not self.problems

    def problem(self, text: str) -> None:
        """Note and print a problem. After _MOST_PROBLEMS of them do nothing, because one cause may
        have many effects."""
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(text)
            print(f"PROBLEM: {text}", file=sys.stderr, flush=True)

    def step_done(self, done: host_pb2.RunStepResponse, guest: str) -> None:
        self.steps += 1
        self.verified_pages += done.verified_pages
        self.wrong_pages += done.wrong_pages
        if done.wrong_pages:
            self.problem(f"guest {guest}: {done.wrong_pages} of {done.verified_pages} pages wrong")

    def books(self, guest: str, ledger: host_pb2.Ledger) -> None:
        """Store the books of a guest, unless the stored ones have more batches, and so are
        newer."""
        known = self._books.get(guest)
        if known is None or known.batches <= ledger.batches:
            self._books[guest] = ledger

    @property
    def reclaimed_bytes(self) -> int:
        return sum(books.reclaimed_total_bytes for books in self._books.values())

    @property
    def batches(self) -> int:
        return sum(books.batches for books in self._books.values())

    @property
    def skipped_bytes(self) -> Mapping[str, int]:
        """Return how much memory the host skipped, by reason. `wrong_epoch` and `stale`: the gate
        did not run a batch, because it came from an earlier session, or had waited too long."""
        total: Counter[str] = Counter()
        for books in self._books.values():
            total.update(books.skipped_total_bytes)
        return total

    def as_dict(self) -> dict[str, object]:
        """Return the report as an object for JSON."""
        return {
            "driver": self.driver,
            "seed": self.seed,
            "guests": self.guest_count,
            "elapsed_s": round(self.elapsed_s, 1),
            "faults": self.fault_count,
            "faults_by_kind": {kind.name.lower(): n for kind, n in self.faults.most_common()},
            "faults_missed": self.missed,
            "pages_verified": self.verified_pages,
            "pages_wrong": self.wrong_pages,
            "steps": self.steps,
            "steps_without_answer": self.steps_without_answer,
            "guests_made": self.guests_made,
            "connections": self.connections,
            "impostors_refused": self.impostors_refused,
            "stress_rounds": self.stress_rounds,
            "batches": self.batches,
            "reclaimed_bytes": self.reclaimed_bytes,
            "skipped_bytes": dict(self.skipped_bytes),
            "problems": self.problems,
        }

    def line(self) -> str:
        """Return one line about the run so far."""
        return (
            f"{self.elapsed_s:6.0f} s  {self.fault_count} faults  "
            f"{self.verified_pages} pages verified, {self.wrong_pages} wrong  "
            f"{self.reclaimed_bytes / GIB:.1f} GiB reclaimed in {self.batches} batches  "
            f"{len(self.problems)} problems"
        )

    def table(self) -> str:
        """Return the report as a table for people."""
        rows: list[tuple[str, object]] = [
            *((kind.value, count) for kind, count in self.faults.most_common()),
            ("faults", self.fault_count),
            ("pages verified", self.verified_pages),
            ("pages wrong", self.wrong_pages),
            ("workload steps", self.steps),
            ("steps without an answer", self.steps_without_answer),
            ("guests made", self.guests_made),
            ("connections", self.connections),
            ("impostors refused", self.impostors_refused),
            ("batches", self.batches),
            ("reclaimed", format_size(self.reclaimed_bytes)),
            *((f"skipped, {why}", format_size(n)) for why, n in self.skipped_bytes.items()),
        ]
        if self.stress_rounds:
            rows.append(("rounds of stress-ng", self.stress_rounds))
        return "\n".join(f"{name:28}{value!s:>14}" for name, value in rows)
