"""Opens the SQLite file of the store: schema, migrations, and conversion of storage errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hintfleet.errors import HintfleetError, LimitExceeded, Refused

_BUSY_TIMEOUT_S = 10.0
_DISK_FULL_MESSAGES = ("is full", "No space left", "File too large", "quota exceeded")
"""Parts of the messages of SQLite, DuckDB and the kernel (ENOSPC, EFBIG, EDQUOT). DuckDB's
errors carry no errno, only its text."""

# Migration i takes a database from version i to i + 1 (PRAGMA user_version).
_MIGRATIONS = (
    """
    CREATE TABLE runs (
        run_id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        driver TEXT NOT NULL,
        spec_text TEXT NOT NULL,
        spec_hash TEXT NOT NULL,
        control TEXT,
        summary TEXT NOT NULL,
        started_unix_us INTEGER NOT NULL,
        ended_unix_us INTEGER NOT NULL DEFAULT 0,
        state TEXT NOT NULL,
        reason TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE TABLE trials (
        trial_id TEXT PRIMARY KEY,
        run_id TEXT NOT NULL REFERENCES runs,
        position INTEGER NOT NULL,
        arm TEXT NOT NULL,
        repetition INTEGER NOT NULL,
        started_unix_us INTEGER NOT NULL,
        ended_unix_us INTEGER NOT NULL DEFAULT 0,
        undecided TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE INDEX trials_by_run ON trials (run_id, position);
    CREATE TABLE events (
        event_id INTEGER PRIMARY KEY,
        trial_id TEXT NOT NULL REFERENCES trials,
        host TEXT NOT NULL,
        at_unix_us INTEGER NOT NULL,
        kind TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT;
    CREATE INDEX events_by_trial ON events (trial_id, host);
    CREATE TABLE footprints (
        trial_id TEXT NOT NULL REFERENCES trials,
        host TEXT NOT NULL,
        guest TEXT NOT NULL,
        footprint TEXT,
        undecided TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (trial_id, host, guest)
    ) STRICT;
    """,
    # cost: set in the row of a host (guest '') that has a footprint.
    # arm_position: the index of the arm in Spec.trial_arms.
    """
    ALTER TABLE footprints ADD COLUMN cost TEXT;
    ALTER TABLE trials ADD COLUMN arm_position INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN environment TEXT NOT NULL DEFAULT '{}';
    """,
    # attempt: see plan.Trial. Figures use the last attempts only (view counted_trials).
    # lost: 1 if the outcome of the trial is LOST (trial_outcome.TrialStatus).
    # overrides: see reader.Run. libvirt_uri: --libvirt-uri. Both are needed to resume the run.
    # parts: a row acknowledges a part that is whole and on disk.
    """
    ALTER TABLE trials ADD COLUMN attempt INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE trials ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN overrides TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE runs ADD COLUMN libvirt_uri TEXT NOT NULL DEFAULT '';
    CREATE TABLE parts (
        trial_id TEXT NOT NULL REFERENCES trials,
        number INTEGER NOT NULL,
        row_count INTEGER NOT NULL,
        PRIMARY KEY (trial_id, number)
    ) STRICT;
    CREATE VIEW counted_trials AS SELECT * FROM trials AS t WHERE NOT EXISTS (
        SELECT 1 FROM trials AS later WHERE later.run_id = t.run_id
        AND later.position = t.position AND later.attempt > t.attempt
    );
    """,
    # capacity: a Capacity as JSON, in the row of a host (guest '') that has one: only in a run that
    # asks how many guests a host can run (Spec.asks_how_many).
    """
    ALTER TABLE footprints ADD COLUMN capacity TEXT;
    """,
    # precision: of a run that looks whether to go on (precision.Precision), else null.
    """
    ALTER TABLE runs ADD COLUMN precision TEXT NOT NULL DEFAULT 'null';
    """,
    # nodes: the nodes.Node of each node that hosts of the run ran on, by Ray's id.
    # places: by host, the id of the node that the host ran on in this trial.
    """
    ALTER TABLE runs ADD COLUMN nodes TEXT NOT NULL DEFAULT '{}';
    ALTER TABLE trials ADD COLUMN places TEXT NOT NULL DEFAULT '{}';
    """,
    # switchback: 1 for a run whose trials are blocks of guests that were there already.
    # left_out_pairs: those of switchbacks in which a block is undecided, or that have a guest in
    # one block only (savings.counted). CROSS JOIN: SQLite then joins in this order, and looks only
    # at switchbacks; else it would scan the footprints of all runs.
    """
    ALTER TABLE runs ADD COLUMN switchback INTEGER NOT NULL DEFAULT 0;
    CREATE VIEW left_out_pairs AS
    SELECT run_id, repetition FROM counted_trials JOIN runs USING (run_id)
    WHERE switchback AND undecided != '' AND NOT lost
    UNION
    SELECT run_id, repetition FROM (
        SELECT w.run_id, w.repetition, f.host, f.guest FROM (
            SELECT c.run_id, c.repetition
            FROM runs AS r CROSS JOIN counted_trials AS c ON c.run_id = r.run_id
            WHERE r.switchback AND c.undecided = '' AND c.ended_unix_us
            GROUP BY c.run_id, c.repetition HAVING count(*) = 2
        ) AS w
        CROSS JOIN counted_trials AS t ON t.run_id = w.run_id AND t.repetition = w.repetition
        CROSS JOIN footprints AS f ON f.trial_id = t.trial_id AND f.guest != ''
    ) GROUP BY run_id, repetition, host, guest HAVING count(*) = 1;
    """,
    # asks_how_many: 1 for a run whose figure is how many guests a host can run, so that it has no
    # savings (Spec.asks_how_many); 0 for all runs of earlier versions.
    """
    ALTER TABLE runs ADD COLUMN asks_how_many INTEGER NOT NULL DEFAULT 0;
    """,
)


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create the database, and migrate it to the schema of this version.

    :raises LimitExceeded: the disk is full.
    :raises Refused: a newer version of hintfleet wrote the file, it is not an SQLite database, or
        it cannot be opened.
    """
    with errors_mapped(path):
        # isolation_level None: else Python's sqlite3 opens transactions by itself before an
        # INSERT or UPDATE. This package opens its transactions with BEGIN; a statement outside
        # of them commits on its own.
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        connection.row_factory = sqlite3.Row
        # WAL: to read (`show`, `serve`), nobody waits for the writer of a run or blocks it.
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode FULL syncs the log at every commit; with NORMAL a power failure can undo
        # commits (sqlite.org/pragma.html#pragma_synchronous).
        connection.execute("PRAGMA synchronous = FULL")
        # SQLite does not check foreign keys by default; each connection has to ask for it.
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    if _version(connection, path) == len(_MIGRATIONS):
        return  # without BEGIN IMMEDIATE: a reader must not wait for the writer of a run
    # Two processes may open the same new or old file at once. The second process waits here for
    # the first, and reads the version again below.
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Not executescript(), which would first commit the open transaction (Python's sqlite3).
        for script in _MIGRATIONS[_version(connection, path) :]:
            for statement in filter(str.strip, script.split(";")):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(_MIGRATIONS):
        raise Refused(
            f"{path} was written by a newer hintfleet (version {version})",
            hint="update hintfleet, or choose another folder with --data-dir",
        )
    return version


@contextmanager
def errors_mapped(path: Path) -> Iterator[None]:
    """Convert errors of SQLite and OSError, raised in the block, as `storage_error` does.

    :raises LimitExceeded: the disk is full.
    :raises Refused: the file cannot be opened, read or written.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: Exception) -> HintfleetError:
    """Return the error to raise for a failed read or write at `path`: LimitExceeded if the disk or
    a quota is full, or the file may not become larger; else Refused."""
    message = str(error)
    if isinstance(error, OSError):
        message, path = error.strerror or message, Path(error.filename or path)
    if any(words in message for words in _DISK_FULL_MESSAGES):
        return LimitExceeded(
            f"the disk is full: cannot write results to {path.parent} ({message})",
            hint="free space, or choose another folder with --data-dir; stored results are intact",
        )
    return Refused(f"cannot use {path}: {message}", hint="choose another folder with --data-dir")
