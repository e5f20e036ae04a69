"""Writing one run as it happens."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hintfleet.errors import HintfleetError
from orchestrator.results.cost import COUNTERS, Cost, host_cost
from orchestrator.results.footprint import Footprint, Undecided, guest_footprint, host_footprint
from orchestrator.results.store.database import reported
from orchestrator.results.store.lock import take_lock
from orchestrator.results.store.reader import Store
from orchestrator.results.store.samples import read_series, write_part
from orchestrator.spec.model import Spec
from orchestrator.trial.plan import HostTask, Trial
from orchestrator.trial.records import (
    Event,
    GuestEnded,
    GuestSettled,
    HostDone,
    Record,
    Samples,
    StepDone,
)

_PART_PERIOD_S = 2.0
_RESERVE_BYTES = 1 << 20
RESERVE = "reserve"


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What is known of a run before it starts.

    :ivar environment: what it runs on; see `machine.environment`.
    :ivar overrides: top-level keys that replaced what `spec_text` says.
    """

    run_id: str
    spec: Spec
    spec_text: str
    summary: str
    environment: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    libvirt_uri: str = ""


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """How an attempt at a trial ended.

    :ivar undecided: why it counts for nothing; empty if it counts.
    :ivar lost: because a host or its actor was lost, and for no other reason.
    """

    undecided: str = ""
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial came to for a guest, or for a host (guest "").

    :ivar footprint: None where `undecided` says why there is none.
    :ivar cost: of a host with a footprint.
    """

    guest: str
    footprint: Footprint | None = None
    cost: Cost | None = None
    undecided: str = ""


class RunWriter:
    """Writes a run. Use as a context manager: the run is over when it is left.

    Left by an error, the run is stored as failed, or as interrupted by
    KeyboardInterrupt; either can be taken up again. A reserve on disk is kept so that
    this can be written even when the disk is full.
    """

    def __init__(self, store: Store, header: RunHeader, again: bool = False) -> None:
        """Begin a run, or take up one that is stored.

        :raises LimitExceeded: the disk is full.
        :raises Refused: cannot be written, or another process runs it now.
        """
        self._store = store
        self._header = header
        self._folder = store.samples_dir(header.run_id)
        self._trial: _OpenTrial | None = None
        with reported(store.path):
            # Held as long as this process lives, so that others can tell.
            self._lock_fd = take_lock(self._folder)
            (self._folder / RESERVE).write_bytes(bytes(_RESERVE_BYTES))
            if again:
                self._take_up_run()
            else:
                self._insert_run()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            reason = "; ".join(self._undecided())
            self._end("undecided" if reason else "done", reason)
        else:
            # The error itself is what the user has to see, not one of storing it.
            with suppress(HintfleetError):
                self._end(*_failure(error))

    def begin_trial(self, trial: Trial, tasks: dict[str, HostTask]) -> None:
        """What `append` gets from now on belongs to this trial."""
        self._trial = _OpenTrial(self._folder / trial.trial_id, trial, tasks)
        self._execute(
            "INSERT INTO trials (trial_id, run_id, position, arm, arm_position, repetition, "
            "attempt, started_unix_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            trial.trial_id,
            trial.run_id,
            trial.position,
            trial.arm.name,
            self._header.spec.trial_arms.index(trial.arm),
            trial.repetition,
            trial.attempt,
            _now_us(),
        )

    def append(self, record: Record) -> None:
        """Store a record. Events are on disk on return, samples within about 2 s: they
        are acknowledged by the row in `parts` that is committed then.

        :raises LimitExceeded: the disk is full. What was stored before is intact.
        """
        trial = self._open_trial()
        if isinstance(record, Samples):
            trial.add_samples(record)
            if trial.is_due:
                self._flush(trial)
            return
        self._execute(
            "INSERT INTO events (trial_id, host, at_unix_us, kind, detail) VALUES (?, ?, ?, ?, ?)",
            record.trial_id,
            record.host,
            record.at_unix_us,
            type(record).__name__,
            json.dumps(asdict(record)),
        )
        trial.add_event(record)

    def end_trial(self) -> TrialEnd:
        """Store what the trial's guests used: all of it or, killed meanwhile, nothing."""
        trial = self._open_trial()
        self._flush(trial)
        outcomes = {task.host: trial.outcomes(task) for task in trial.tasks.values()}
        end = trial.end(outcomes)
        with self._transaction():
            for host, of_host in outcomes.items():
                for outcome in of_host:
                    self._insert_outcome(trial, host, outcome)
            self._execute(
                "UPDATE trials SET ended_unix_us = ?, undecided = ?, lost = ? WHERE trial_id = ?",
                _now_us(),
                end.undecided,
                end.lost,
                trial.trial.trial_id,
            )
        self._trial = None
        return end

    def _flush(self, trial: _OpenTrial) -> None:
        """Write what is buffered as a part, and then say that it is there."""
        row_count = trial.write_part()
        if row_count:
            self._execute(
                "INSERT INTO parts (trial_id, number, row_count) VALUES (?, ?, ?)",
                trial.trial.trial_id,
                trial.part_count,
                row_count,
            )

    def _undecided(self) -> list[str]:
        with reported(self._store.path):
            rows = self._store.database.execute(
                "SELECT DISTINCT undecided FROM counted_trials "
                "WHERE run_id = ? AND undecided != '' ORDER BY position",
                (self._header.run_id,),
            ).fetchall()
        return [row["undecided"] for row in rows]

    def _open_trial(self) -> _OpenTrial:
        if self._trial is None:
            raise RuntimeError("no trial has begun")
        return self._trial

    def _insert_run(self) -> None:
        spec = self._header.spec
        self._execute(
            "INSERT INTO runs (run_id, name, driver, spec_text, spec_hash, control, summary, "
            "started_unix_us, state, environment, overrides, libvirt_uri) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'running', ?, ?, ?)",
            self._header.run_id,
            spec.name,
            spec.driver,
            self._header.spec_text,
            spec_hash(spec),
            spec.control,
            self._header.summary,
            _now_us(),
            json.dumps(self._header.environment),
            json.dumps(self._header.overrides),
            self._header.libvirt_uri,
        )

    def _take_up_run(self) -> None:
        self._execute(
            "UPDATE runs SET state = 'running', reason = '', ended_unix_us = 0, environment = ? "
            "WHERE run_id = ?",
            json.dumps(self._header.environment),
            self._header.run_id,
        )

    def _insert_outcome(self, trial: _OpenTrial, host: str, outcome: Outcome) -> None:
        self._execute(
            "INSERT INTO footprints (trial_id, host, guest, footprint, cost, undecided) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            trial.trial.trial_id,
            host,
            outcome.guest,
            json.dumps(asdict(outcome.footprint)) if outcome.footprint else None,
            json.dumps(asdict(outcome.cost)) if outcome.cost else None,
            outcome.undecided,
        )

    def _execute(self, sql: str, *values: object) -> None:
        with reported(self._store.path):
            self._store.database.execute(sql, values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself, as it does when the disk is full.
            if self._store.database.in_transaction:
                self._execute("ROLLBACK")
            raise

    def _end(self, state: str, reason: str) -> None:
        (self._folder / RESERVE).unlink(missing_ok=True)
        if self._trial is not None and state != "failed":
            with suppress(HintfleetError):
                self._flush(self._trial)
        try:
            self._execute(
                "UPDATE runs SET state = ?, reason = ?, ended_unix_us = ? WHERE run_id = ?",
                state,
                reason,
                _now_us(),
                self._header.run_id,
            )
        finally:
            os.close(self._lock_fd)


class _OpenTrial:
    """What a trial's footprints are made of, while it runs."""

    def __init__(self, folder: Path, trial: Trial, tasks: dict[str, HostTask]) -> None:
        self.trial = trial
        self.tasks = tasks
        self._folder = folder
        self._buffered: list[Samples] = []
        self.part_count = 0
        self._flushed_at = time.monotonic()
        self._steps: dict[str, list[StepDone]] = {}
        self._ended: dict[str, GuestEnded] = {}
        self._settled: list[GuestSettled] = []
        self._done: dict[str, HostDone] = {}

    def add_samples(self, samples: Samples) -> None:
        self._buffered.append(samples)

    @property
    def is_due(self) -> bool:
        """Whether what is buffered has waited long enough."""
        return time.monotonic() - self._flushed_at >= _PART_PERIOD_S

    def add_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._steps.setdefault(event.guest, []).append(event)
        elif isinstance(event, GuestEnded):
            self._ended[event.guest] = event
        elif isinstance(event, GuestSettled):
            self._settled.append(event)
        elif isinstance(event, HostDone):
            self._done[event.host] = event

    def write_part(self) -> int:
        """Write what is buffered as a part; returns its number of samples, 0 for none."""
        self._flushed_at = time.monotonic()
        buffered, self._buffered = self._buffered, []
        if buffered:
            self.part_count += 1
            write_part(self._folder, self.part_count, buffered)
        return sum(samples.row_count for samples in buffered)

    def outcomes(self, task: HostTask) -> list[Outcome]:
        """Of a host (guest name "") and each of its guests."""
        names = [guest.name for guest in task.guests]
        done = self._done.get(task.host)
        reason = done.undecided if done else f"{task.host}: did not come to the end"
        if not reason:
            try:
                return self._measured(task, names)
            except Undecided as undecided:
                reason = str(undecided)
        reason = self._wrong_pages(task.host) or reason
        return [Outcome(guest=name, undecided=reason) for name in ("", *names)]

    def end(self, outcomes: Mapping[str, list[Outcome]]) -> TrialEnd:
        """What the outcomes of all hosts come to.

        Pages that came back wrong are a result, and the first to be said, also where the
        host was lost after it: to run the trial again would forget them.
        """
        wrong = [reason for host in outcomes if (reason := self._wrong_pages(host))]
        reasons = {host: of_host[0].undecided for host, of_host in outcomes.items()}
        undecided = {host: reason for host, reason in reasons.items() if reason}
        return TrialEnd(
            undecided=next(iter((*wrong, *undecided.values())), ""),
            lost=bool(undecided)
            and not wrong
            and all(host in self._done and self._done[host].lost for host in undecided),
        )

    def _wrong_pages(self, host: str) -> str:
        """Which guest of a host read back what it had not written; empty if none did."""
        for guest, steps in self._steps.items():
            if count := sum(step.wrong_pages for step in steps if step.host == host):
                return f"{guest}: {count} pages came back wrong"
        return ""

    def _measured(self, task: HostTask, names: list[str]) -> list[Outcome]:
        series = read_series(self._folder, task.host, COUNTERS)
        missing = [name for name in names if name not in series]
        if missing:
            raise Undecided(f"{missing[0]}: there are no samples")
        series = {name: series[name] for name in names}
        steps = {name: self._steps.get(name, []) for name in names}
        settled = [event for event in self._settled if event.host == task.host]
        period_s = task.spec.sample_period_s
        guests = [
            guest_footprint(name, series[name], steps[name], self._ended.get(name), period_s)
            for name in names
        ]
        whole = Outcome(
            guest="",
            footprint=host_footprint(series, steps, guests),
            cost=host_cost(series, steps, settled),
        )
        return [
            whole,
            *(Outcome(guest=n, footprint=f) for n, f in zip(names, guests, strict=True)),
        ]


def spec_hash(spec: Spec) -> str:
    """The same for specs that ask for the same, however they are written."""
    asked = spec.model_dump_json(exclude={"description", "timeouts", "under"})
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _failure(error: BaseException) -> tuple[str, str]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "interrupted by the user"
    return "failed", getattr(error, "message", "") or f"{type(error).__name__}: {error}"


def _now_us() -> int:
    return time.time_ns() // 1000
