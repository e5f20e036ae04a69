"""Reads stored runs, their trials and their figures as rows.

Opening a store creates or migrates the database if needed, and marks abandoned runs as
interrupted. This module writes nothing else to the database.
"""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hintfleet.errors import InvalidInput
from orchestrator.cluster.nodes import Node
from orchestrator.results.capacity import CapacityRow
from orchestrator.results.comparison import CostRow
from orchestrator.results.precision import Precision
from orchestrator.results.savings import FootprintRow
from orchestrator.results.store.database import errors_mapped, open_database
from orchestrator.results.store.figure_rows import (
    capacity_row,
    cost_row,
    event_values,
    footprint_rows,
    precision,
)
from orchestrator.results.store.lock import try_lock
from orchestrator.results.trial_outcome import TrialStatus
from orchestrator.spec.file import SET

LATEST = "latest"
_E = TypeVar("_E")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stored run.

    :ivar state: running, done, failed, undecided or interrupted.
    :ivar summary: the size of the experiment, in one line.
    :ivar ended_unix_us: 0 while the run runs.
    :ivar nodes: those that its hosts ran on, by the ids in `StoredTrial.places`.
    :ivar overrides: the top-level keys that replaced those in `spec_text`, with their values: from
        options of the command line, and recordings that were read from files; and the values of
        --set, under the key SET.
    :ivar precision: None if the number of repetitions is fixed.
    :ivar switchback: 1 for a switchback, of which some pairs are left out (view `left_out_pairs`).
    :ivar asks_how_many: 1 for a run whose figure is how many guests a host can run; 0 if an earlier
        version stored it.
    """

    run_id: str
    name: str
    driver: str
    spec_text: str
    spec_hash: str
    control: str | None
    summary: str
    started_unix_us: int
    ended_unix_us: int
    state: str
    reason: str
    nodes: dict[str, Node] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    libvirt_uri: str = ""
    precision: Precision | None = None
    switchback: int = 0
    asks_how_many: int = 0

    @property
    def was_cut_off(self) -> bool:
        """Whether the run was interrupted or failed, so that trials may be left to run."""
        return self.state in ("interrupted", "failed")

    @property
    def options(self) -> tuple[str, ...]:
        """The options of `hintfleet run` that give what is in `overrides`, but for recordings."""
        driver, agents = self.overrides.get("driver"), self.overrides.get("hosts", {}).get("agents")
        settings: dict[str, str] = self.overrides.get(SET, {})
        return (
            *(("--driver", driver) if driver else ()),
            *(word for agent in agents or () for word in ("--host", _host_option(agent))),
            *(word for key, text in settings.items() for word in (SET, f"{key}={text}")),
        )

    @property
    def annotated_spec(self) -> str:
        """The text of the spec, after comments with `options`, and with the name and SHA-256 of
        each file with a recording."""
        comments = [f"run with {shlex.join(self.options)}"] if self.options else []
        comments += [f"{name}: sha256 {digest}" for name, digest in self.recordings.items()]
        # Each line by itself: the value of a setting may have several.
        lines = [line for comment in comments for line in comment.splitlines()]
        return "".join(f"# {line}\n" for line in lines) + self.spec_text

    @property
    def recordings(self) -> dict[str, str]:
        """The SHA-256 of each file with a recording that the run replays, by the file's name."""
        stored = self.overrides.get("recordings", ())
        return {one["name"]: one["sha256"] for one in stored if one.get("sha256")}


@dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """A stored attempt at a trial.

    :ivar ended_unix_us: 0 if it has not ended.
    :ivar undecided: the reason of its TrialOutcome: empty if the trial is done or has not ended.
    :ivar lost: whether the status of its TrialOutcome is LOST.
    :ivar counted: whether this is the last attempt at the trial; figures use only last attempts.
    :ivar places: by host, the id of the node that the host ran on (`Run.nodes`).
    :ivar sample_count: how many samples are safely on disk.
    """

    trial_id: str
    position: int
    arm: str
    repetition: int
    started_unix_us: int
    ended_unix_us: int
    undecided: str
    attempt: int = 1
    lost: bool = False
    counted: bool = True
    places: dict[str, str] = field(default_factory=dict)
    sample_count: int = 0

    @property
    def status(self) -> TrialStatus:
        """The status that follows from the other fields; CUT_OFF until the attempt has ended."""
        if not self.ended_unix_us:
            return TrialStatus.CUT_OFF
        if self.lost:
            return TrialStatus.LOST
        return TrialStatus.UNDECIDED if self.undecided else TrialStatus.DONE


class Store(AbstractContextManager["Store"]):
    """The results in one folder. A context manager that closes the store."""

    def __init__(self, folder: Path) -> None:
        """Open or create the store, and mark abandoned runs as interrupted.

        :raises LimitExceeded: the disk is full.
        :raises Refused: the folder cannot be used.
        """
        self.folder = folder
        self.path = folder / "hintfleet.sqlite"
        with errors_mapped(self.path):
            folder.mkdir(parents=True, exist_ok=True)
        self.database = open_database(self.path)
        self._end_abandoned_runs()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def samples_dir(self, run_id: str) -> Path:
        """Return the folder with a run's samples."""
        return self.folder / "samples" / run_id

    def runs(self, limit: int = 100) -> list[Run]:
        """Return at most `limit` runs, newest first."""
        rows = self._query("SELECT * FROM runs ORDER BY started_unix_us DESC LIMIT ?", limit)
        return [_run(row) for row in rows]

    def find_run(self, name: str) -> Run:
        """Return the run with this id or this unique part of an id; the newest run for `latest`.

        :raises InvalidInput: there is no such run, or more than one.
        """
        if name == LATEST:
            rows = self._query("SELECT * FROM runs ORDER BY started_unix_us DESC LIMIT 1")
        else:
            # Not LIKE, which would read `%` and `_` in a name as wildcards.
            rows = self._query("SELECT * FROM runs WHERE instr(run_id, ?) LIMIT 2", name.lower())
        if len(rows) != 1:
            raise InvalidInput(
                f"{'more than one run has' if rows else 'there is no run'} {name!r}"
                f"{' in its id' if rows else ''}",
                hint="`hintfleet runs` lists them; 'latest' is the newest",
            )
        return _run(rows[0])

    def has_run(self, run_id: str) -> bool:
        """Return whether a run with this id is stored."""
        return bool(self._query("SELECT 1 FROM runs WHERE run_id = ?", run_id))

    def trials(self, run_id: str) -> list[StoredTrial]:
        """Return all attempts at a run's trials, in the order in which they began."""
        rows = self._query(
            "SELECT t.*, trial_id IN (SELECT trial_id FROM counted_trials) AS counted, "
            "  (SELECT ifnull(sum(row_count), 0) FROM parts p WHERE p.trial_id = t.trial_id) "
            "  AS sample_count "
            "FROM trials t WHERE run_id = ? ORDER BY started_unix_us, position",
            run_id,
        )
        return [_stored_trial(row) for row in rows]

    def footprint_rows(
        self,
        run_id: str = "",
        since_unix_s: int = 0,
        *,
        of_guests: bool = False,
        even_running: bool = False,
    ) -> list[FootprintRow]:
        """Return the footprints of runs that have ended, for `savings.aggregate`.

        Only the last attempt at each trial counts. The newest run is first. Within a run the
        control is first, then the other arms in the order of the spec. A trial that was cut off
        has no figures. It still has rows, without a footprint: one for each host (or guest) that an
        ended trial of the same run has, or a single row if no trial of the run has ended. A run
        whose figure is how many guests a host can run has no footprints and no rows.

        :param run_id: only this run; empty for all.
        :param since_unix_s: only runs that started at or after this time; 0 for all.
        :param of_guests: return the rows of guests, not those of hosts: there are many more.
        :param even_running: also of runs that have not ended.
        """
        trials = self._query(
            "SELECT r.run_id, r.name, r.spec_hash, r.control, r.precision, "
            "       t.trial_id, t.arm, t.repetition, t.undecided, t.lost, "
            "       (run_id, t.repetition) IN left_out_pairs AS left_out, "
            "       r.switchback AND t.ended_unix_us AND t.undecided = '' AS is_whole_block "
            "FROM counted_trials t JOIN runs r USING (run_id) "
            # In seconds: in microseconds, a time that a client has made up may have over 64 bits.
            "WHERE (?1 = '' OR run_id = ?1) AND r.started_unix_us / 1000000 >= ?2 "
            "  AND (?3 OR r.state != 'running') "
            "  AND NOT r.asks_how_many "
            "  AND run_id NOT IN (SELECT run_id FROM footprints JOIN trials USING (trial_id) "
            "                     WHERE guest = '' AND capacity IS NOT NULL) "
            "ORDER BY r.started_unix_us DESC, t.arm IS NOT r.control, t.arm_position, t.position",
            run_id,
            since_unix_s,
            even_running,
        )
        figures = self._query(
            "SELECT run_id, trial_id, host, guest, footprint "
            "FROM json_each(?) JOIN trials ON run_id = value JOIN footprints USING (trial_id) "
            "WHERE (guest != '') = ?",
            json.dumps(list({trial["run_id"] for trial in trials})),
            of_guests,
        )
        return footprint_rows(trials, figures)

    def cost_rows(self, run_id: str) -> list[CostRow]:
        """Return the costs of a run's hosts, for `comparison.compare`; empty while the run runs.

        Only the last attempt at each trial counts. A trial that was cut off has one row, without
        a host and a cost.
        """
        rows = self._query(
            "SELECT r.control, r.precision, t.arm, t.repetition, t.undecided, "
            "       (t.run_id, t.repetition) IN left_out_pairs AS left_out, "
            "       ifnull(f.host, '') AS host, f.cost "
            "FROM counted_trials t JOIN runs r ON r.run_id = t.run_id "
            "     LEFT JOIN footprints f ON f.trial_id = t.trial_id AND f.guest = '' "
            "WHERE t.run_id = ? AND r.state != 'running' "
            "ORDER BY t.arm IS NOT r.control, t.arm_position, t.position, f.host",
            run_id,
        )
        return [cost_row(row) for row in rows]

    def capacity_rows(self, run_id: str) -> list[CapacityRow]:
        """Return the capacities of a run's hosts, for `capacity.capacities`; empty while the run
        runs, and for a run without a capacity.

        Only the last attempt at each trial counts. A trial that was cut off has one row, without a
        host and a capacity.
        """
        rows = self._query(
            "SELECT r.control, t.arm, t.repetition, t.undecided, "
            "       ifnull(f.host, '') AS host, f.capacity "
            "FROM counted_trials t JOIN runs r ON r.run_id = t.run_id "
            "     LEFT JOIN footprints f ON f.trial_id = t.trial_id AND f.guest = '' "
            "WHERE t.run_id = ? AND r.state != 'running' "
            "ORDER BY t.arm IS NOT r.control, t.arm_position, t.position, f.host",
            run_id,
        )
        return [capacity_row(row) for row in rows if any(r["capacity"] for r in rows)]

    def events(self, run_id: str, kind: type[_E]) -> list[_E]:
        """Return all events of one kind in a run, ordered by time."""
        rows = self._query(
            "SELECT detail FROM events JOIN trials USING (trial_id) "
            "WHERE run_id = ? AND kind = ? ORDER BY at_unix_us",
            run_id,
            kind.__name__,
        )
        return [kind(**event_values(row["detail"])) for row in rows]

    def _query(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with errors_mapped(self.path):
            return self.database.execute(sql, values).fetchall()

    def _end_abandoned_runs(self) -> None:
        """Mark as interrupted each run whose state is `running`, but whose lock nobody holds: its
        process was killed, or the power failed."""
        for row in self._query("SELECT run_id FROM runs WHERE state = 'running'"):
            with errors_mapped(self.path):
                fd = try_lock(self.samples_dir(row["run_id"]))
                if fd is None:
                    continue
                # The lock is held until the update is committed. Otherwise another process could
                # resume the run just before the update, which would then mark it as interrupted.
                try:
                    self.database.execute(
                        "UPDATE runs SET state = 'interrupted', ended_unix_us = ?, "
                        "reason = 'its process was killed or the machine went down' "
                        "WHERE run_id = ? AND state = 'running'",
                        (time.time_ns() // 1000, row["run_id"]),
                    )
                finally:
                    os.close(fd)


def _host_option(agent: str | dict[str, str]) -> str:
    return agent if isinstance(agent, str) else f"{agent['address']},node={agent['node']}"


def _run(row: sqlite3.Row) -> Run:
    values = {name: row[name] for name in Run.__dataclass_fields__}
    environment = json.loads(values["environment"])
    overrides = json.loads(values["overrides"], object_hook=_with_tuples)
    nodes = {node_id: Node(**facts) for node_id, facts in json.loads(row["nodes"]).items()}
    decoded = {
        "environment": environment,
        "overrides": overrides,
        "nodes": nodes,
        "precision": precision(row["precision"]),
    }
    return Run(**values | decoded)


def _with_tuples(stored: dict[str, Any]) -> dict[str, Any]:
    # JSON has no tuples, and the spec model is strict: it rejects a list in place of a tuple.
    return {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}


def _stored_trial(row: sqlite3.Row) -> StoredTrial:
    values = {name: row[name] for name in StoredTrial.__dataclass_fields__}
    values |= {name: bool(values[name]) for name in ("lost", "counted")}
    return StoredTrial(**values | {"places": json.loads(values["places"])})
