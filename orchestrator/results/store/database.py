"""The SQLite file: its schema, its version, and what goes wrong with it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hintfleet.errors import HintfleetError, LimitExceeded, Refused

_BUSY_TIMEOUT_S = 10.0
_FULL = ("is full", "No space left", "File too large", "quota exceeded")
"""What SQLite, DuckDB and the kernel (ENOSPC, EFBIG, EDQUOT) say of a disk."""

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
    # cost: of a host's row, where there is a footprint. arm_position: in the spec.
    """
    ALTER TABLE footprints ADD COLUMN cost TEXT;
    ALTER TABLE trials ADD COLUMN arm_position INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN environment TEXT NOT NULL DEFAULT '{}';
    """,
    # attempt, lost: see plan.Trial and records.HostDone; figures are of the last attempts.
    # overrides, libvirt_uri: what the command line said, for who takes the run up again.
    # parts: a row says that a part is whole and on disk.
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
)


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create the database, and bring it to this version.

    :raises Refused: it was made by a newer version, or is no such database.
    """
    with errors_mapped(path):
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    if _version(connection, path) == len(_MIGRATIONS):
        return  # who only reads does not wait for who writes
    connection.execute("BEGIN IMMEDIATE")  # two processes may open a new file at once
    try:
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
    """Turn the errors of SQLite and the file system into ours.

    :raises LimitExceeded: the disk is full.
    :raises Refused: the file cannot be opened, read or written.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: Exception) -> HintfleetError:
    """What a failed write or read at `path` means."""
    said = str(error)
    if isinstance(error, OSError):
        said, path = error.strerror or said, Path(error.filename or path)
    if any(words in said for words in _FULL):
        return LimitExceeded(
            f"the disk is full: cannot write results to {path.parent} ({said})",
            hint="make room, or choose another folder with --data-dir; what was stored is intact",
        )
    return Refused(f"cannot use {path}: {said}", hint="choose another folder with --data-dir")
