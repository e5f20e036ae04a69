"""Stores one run while it runs.

Decides nothing: `results/trial_outcome.py` decides the outcome of a trial,
`results/run_outcome.py` that of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hintfleet.errors import HintfleetError
from orchestrator.cluster.nodes import Node
from orchestrator.results.cost import COUNTERS
from orchestrator.results.footprint import Series
from orchestrator.results.precision import Precision
from orchestrator.results.run_outcome import RunOutcome, run_outcome
from orchestrator.results.store.database import errors_mapped
from orchestrator.results.store.lock import take_lock
from orchestrator.results.store.reader import Store
from orchestrator.results.store.samples import PartWriter, read_series
from orchestrator.results.trial_outcome import TrialFigures, TrialOutcome, TrialStatus
from orchestrator.spec.model import Spec
from orchestrator.trial.plan import Trial
from orchestrator.trial.records import Event, HypervisorFound, Record, Samples

# The size of the reserve file, which is deleted before the end of a run is stored, so that a full
# disk has room for it. SQLite's log needs far less for these rows.
_RESERVE_BYTES = 1 << 20
RESERVE = "reserve"
# How many hosts `series` reads at once. Each read goes through all parts of a trial, so fewer
# reads are faster; but what one read returns is in memory at once.
_HOSTS_PER_READ = 50
_NO_NODES: Mapping[str, Node] = {}


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """The facts about a run that are known before it starts.

    :ivar environment: facts about the machine (`machine.environment`); of a resumed run, those of
        all its parts, with the hypervisors of its guests.
    :ivar overrides: as in `spec.file.LoadedSpec`.
    """

    run_id: str
    spec: Spec
    spec_text: str
    summary: str
    environment: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    libvirt_uri: str = ""


class _OpenTrial:
    """The trial that runs now, with its buffered samples."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self.trial = trial
        self.folder = folder
        self.parts = PartWriter(folder)


class RunWriter(AbstractContextManager["RunWriter"]):
    """Stores a run. A context manager: the end of the run is stored when the block ends.

    If the block ends by KeyboardInterrupt, the run is stored as interrupted; if by another
    error, as failed. Both kinds can be resumed. Without an error, the run is stored as done or
    undecided. A reserve file of 1 MiB is deleted before the end of the run is stored, to make
    room if the disk is full.
    """

    def __init__(self, store: Store, header: RunHeader, resume: bool = False) -> None:
        """Begin a run, or resume one that is stored. After a failure the run is not locked.

        :raises LimitExceeded: the disk is full.
        :raises Refused: the store cannot be written, or another process runs this run.
        """
        self._store = store
        self._header = header
        self._folder = store.samples_dir(header.run_id)
        self._trial: _OpenTrial | None = None
        self._environment = dict(header.environment)
        with errors_mapped(store.path), ExitStack() as undo:
            # The lock is held until the run ends. If this process is killed, the kernel releases
            # the lock, and the next reader sees that the run was abandoned
            # (`Store._end_abandoned_runs`).
            self._lock_fd = take_lock(self._folder)
            undo.callback(os.close, self._lock_fd)
            undo.callback((self._folder / RESERVE).unlink, missing_ok=True)
            (self._folder / RESERVE).write_bytes(bytes(_RESERVE_BYTES))
            if resume:
                self._resume_run()
            else:
                self._insert_run()
            undo.pop_all()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            if error is None:
                self._end(run_outcome(None, self._undecided()))
            else:
                # An error while the end is stored is suppressed: the user has to see `error`,
                # which ended the run.
                with suppress(HintfleetError):
                    self._end(run_outcome(error, ()))
        finally:
            os.close(self._lock_fd)

    def begin_trial(self, trial: Trial, nodes: Mapping[str, Node] = _NO_NODES) -> None:
        """Store the start of a trial. Records can be appended to it until `end_trial`.

        :param nodes: where each host runs, by the host's name.
        """
        self._trial = _OpenTrial(trial, self._folder / trial.trial_id)
        facts = {node.node_id: asdict(node) for node in nodes.values()}
        with self._transaction():
            self._execute(
                "INSERT INTO trials (trial_id, run_id, position, arm, arm_position, repetition, "
                "attempt, started_unix_us, places) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                trial.trial_id,
                trial.run_id,
                trial.position,
                trial.arm.name,
                self._header.spec.trial_arms.index(trial.arm),
                trial.repetition,
                trial.attempt,
                _now_us(),
                json.dumps({host: node.node_id for host, node in nodes.items()}),
            )
            self._execute(
                "UPDATE runs SET nodes = json_patch(nodes, ?) WHERE run_id = ?",
                json.dumps(facts),
                trial.run_id,
            )

    def append(self, batch: Sequence[Record]) -> None:
        """Store records. Events are on disk on return. Samples are buffered; while samples arrive,
        the buffer is written to disk about every 2 s.

        :raises LimitExceeded: the disk is full. Buffered samples may be lost; all that is on disk
            is intact.
        :raises Refused: the store cannot be written; the same holds.
        """
        trial = self._open_trial()
        events = [record for record in batch if not isinstance(record, Samples)]
        if events:
            with self._transaction():  # one for all: each transaction waits for the disk
                for event in events:
                    self._insert_event(event)
                    if isinstance(event, HypervisorFound):
                        self._note_hypervisor(event.hypervisor)
        # Buffered: each actor sends samples every 0.25 s (trial/host_group.py), and a part costs
        # a file and two fsyncs.
        for record in batch:
            if isinstance(record, Samples):
                trial.parts.add(record)
                if trial.parts.is_due:
                    self._flush(trial)

    def series(self, hosts: Sequence[str]) -> Iterator[tuple[str, dict[str, Series]]]:
        """Yield each of these hosts with its samples in the open trial, by guest, with COUNTERS.

        Stores the buffered samples first. 50 hosts are in memory at a time.

        :raises LimitExceeded: the disk is full.
        :raises Refused: a part is damaged, or cannot be read or written.
        """
        trial = self._open_trial()
        self._flush(trial)
        for begin in range(0, len(hosts), _HOSTS_PER_READ):
            some = hosts[begin : begin + _HOSTS_PER_READ]
            found = read_series(trial.folder, some, COUNTERS)
            yield from ((host, found.get(host, {})) for host in some)

    def end_trial(self, outcome: TrialOutcome) -> None:
        """Store the trial's figures and its end in one transaction.

        Stores the buffered samples first.

        :raises LimitExceeded: the disk is full. Figures and end are not stored; the trial stays
            open.
        :raises Refused: the store cannot be written; the same holds.
        """
        trial = self._open_trial()
        self._flush(trial)
        with self._transaction():
            for figures in outcome.figures:
                self._insert_figures(trial, figures)
            self._execute(
                "UPDATE trials SET ended_unix_us = ?, undecided = ?, lost = ? WHERE trial_id = ?",
                _now_us(),
                outcome.reason,
                outcome.status is TrialStatus.LOST,
                trial.trial.trial_id,
            )
        self._trial = None

    def _flush(self, trial: _OpenTrial) -> None:
        """Write the buffered samples as a part, and then store its row in the table `parts`."""
        # The part first: after a crash, no row may name a part that does not exist.
        row_count = trial.parts.flush()
        if row_count:
            self._execute(
                "INSERT INTO parts (trial_id, number, row_count) VALUES (?, ?, ?)",
                trial.trial.trial_id,
                trial.parts.part_count,
                row_count,
            )

    def _undecided(self) -> list[str]:
        """Return the reasons of the trials whose last attempts are undecided or lost: each reason
        once, in the order of the trials. Those of a switchback's undecided blocks are not among
        them: their pairs are left out."""
        with errors_mapped(self._store.path):
            rows = self._store.database.execute(
                "SELECT DISTINCT undecided FROM counted_trials "
                "WHERE run_id = ? AND undecided != '' AND (lost OR NOT ?) ORDER BY position",
                (self._header.run_id, self._header.spec.switchback is not None),
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
            "started_unix_us, state, environment, overrides, libvirt_uri, precision, switchback, "
            "asks_how_many) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'running', ?, ?, ?, ?, ?, ?)",
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
            json.dumps(asdict(precision) if (precision := precision_of(spec)) else None),
            spec.switchback is not None,
            spec.asks_how_many,
        )

    def _resume_run(self) -> None:
        self._execute(
            "UPDATE runs SET state = 'running', reason = '', ended_unix_us = 0, environment = ? "
            "WHERE run_id = ?",
            json.dumps(self._header.environment),
            self._header.run_id,
        )

    def _insert_event(self, event: Event) -> None:
        self._execute(
            "INSERT INTO events (trial_id, host, at_unix_us, kind, detail) VALUES (?, ?, ?, ?, ?)",
            event.trial_id,
            event.host,
            event.at_unix_us,
            type(event).__name__,
            json.dumps(asdict(event)),
        )

    def _note_hypervisor(self, found: str) -> None:
        """Add a hypervisor to the run's environment, unless it is there."""
        known = set(filter(None, self._environment.get("hypervisor", "").split("; ")))
        if found in known:
            return
        # Sorted, so that two runs on the same hosts have the same text.
        self._environment["hypervisor"] = "; ".join(sorted(known | {found}))
        self._execute(
            "UPDATE runs SET environment = ? WHERE run_id = ?",
            json.dumps(self._environment),
            self._header.run_id,
        )

    def _insert_figures(self, trial: _OpenTrial, figures: TrialFigures) -> None:
        self._execute(
            "INSERT INTO footprints (trial_id, host, guest, footprint, cost, capacity, undecided) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            trial.trial.trial_id,
            figures.host,
            figures.guest,
            json.dumps(asdict(figures.footprint)) if figures.footprint else None,
            json.dumps(asdict(figures.cost)) if figures.cost else None,
            json.dumps(asdict(figures.capacity)) if figures.capacity else None,
            figures.undecided,
        )

    def _execute(self, sql: str, *values: object) -> None:
        with errors_mapped(self._store.path):
            self._store.database.execute(sql, values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE takes SQLite's write lock now, and waits for it up to the connection's timeout.
        # So no later statement of the transaction can fail because another process writes.
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            # SQLite may have rolled back by itself, as on SQLITE_FULL or SQLITE_IOERR; another
            # ROLLBACK would then be an error (sqlite.org/lang_transaction.html).
            if self._store.database.in_transaction:
                self._execute("ROLLBACK")
            raise

    def _end(self, outcome: RunOutcome) -> None:
        # The reserve is deleted first: if the disk is full, this makes room for the rows below.
        (self._folder / RESERVE).unlink(missing_ok=True)
        if self._trial is not None and outcome.state != "failed":
            with suppress(HintfleetError):
                self._flush(self._trial)
        self._execute(
            "UPDATE runs SET state = ?, reason = ?, ended_unix_us = ? WHERE run_id = ?",
            outcome.state,
            outcome.reason,
            _now_us(),
            self._header.run_id,
        )


def precision_of(spec: Spec) -> Precision | None:
    """Return the precision that a spec asks for; None if its number of repetitions is fixed."""
    if spec.precision is None:
        return None
    return Precision(
        percent=spec.precision.percent,
        size_bytes=spec.precision.size_bytes,
        least_repetitions=spec.repetitions,
        most_repetitions=spec.most_repetitions,
    )


def spec_hash(spec: Spec) -> str:
    """Return a hash that is equal for specs with equal values, however their text is written."""
    # Left out: description and timeouts, which change no figure, and `under`: its part for this
    # run's driver is merged into the other fields already, and its other parts are not used.
    # Of a recording, the SHA-256 of its file is left out: its name and its points count.
    recordings = {"__all__": {"sha256"}}
    content = spec.model_dump_json(
        exclude={"description": True, "timeouts": True, "under": True, "recordings": recordings}
    )
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _now_us() -> int:
    return time.time_ns() // 1000
