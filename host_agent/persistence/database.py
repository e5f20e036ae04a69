"""What outlives the host agent's process: its guests' books, and how to find them again.

One SQLite file, for one host agent at a time. A lock (flock) is held for as long as the
process lives, and that is what carries I2 over a restart: the kernel finishes a punch
that a thread of a killed process is in, and releases the lock only when the last thread
has ended (the threads share one table of files, kernel/exit.c: exit_files). So whoever
holds the lock knows that no batch of the agent before is running or can ever run.

WAL without fsync (synchronous=OFF): what was written outlives the process, which is all
that is asked. A power failure takes the guests' RAM as well, so each boot of the host
has a folder of its own, and one of an earlier boot is removed unread.

The folders hold tokens. Files are for their owner only; folders can be passed through,
not listed, for QEMU's own user has to reach its console.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from google.protobuf.message import DecodeError

from hintfleet.errors import InvalidInput, Refused, TransientError
from hintfleet.system.file_lock import lock_file, wait_for
from hintfleet.system.processes import find_process
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import Handle
from host_agent.memory.ledger import Books
from host_agent.memory.page_map import PageMap
from host_agent.session.guest_address import GuestAddress

_LOCK_TIMEOUT_S = 1.0
"""For a holder that lives: it may be on its way out."""

_DEATH_TIMEOUT_S = 60.0
"""For one that is dead but for a punch in the kernel: 4 GiB on a busy host take seconds."""

_FOLDER_MODE = 0o711
_SCHEMA_VERSION = 2
_SCHEMA = f"""
    CREATE TABLE door (socket TEXT NOT NULL, address TEXT NOT NULL) STRICT;
    CREATE TABLE guest (
        name TEXT PRIMARY KEY,
        uuid TEXT NOT NULL,
        token TEXT NOT NULL,
        trial_id TEXT NOT NULL,
        spec BLOB NOT NULL,       -- hintfleet.v1.GuestSpec
        handle TEXT NOT NULL,     -- JSON, the driver's
        epoch INTEGER NOT NULL,
        totals BLOB NOT NULL,     -- hintfleet.v1.Ledger
        ram BLOB NOT NULL,        -- PageMap.pack
        reclaimed BLOB NOT NULL,  -- PageMap.pack
        untouched BLOB NOT NULL   -- PageMap.pack
    ) STRICT;
    PRAGMA user_version = {_SCHEMA_VERSION};
"""
_SAVE = "INSERT OR REPLACE INTO guest VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, kw_only=True)
class GuestRecord:
    """One guest, as it is stored."""

    name: str
    uuid: str
    token: str
    trial_id: str
    spec: host_pb2.GuestSpec
    handle: Handle
    epoch: int
    books: Books


class Database:
    """An open state folder. Methods block, and may be called from any thread.

    :ivar guests_folder: for the guests' own files, a folder each.
    """

    def __init__(self, folder: Path) -> None:
        """Use `opened`, which holds the lock."""
        self._path = folder / "state.db"
        self.guests_folder = folder / "guests"
        for made in (folder, self.guests_folder):
            made.mkdir(exist_ok=True)
            made.chmod(_FOLDER_MODE)  # whatever the umask is
        self._path.touch(mode=0o600)
        self._lock = Lock()
        with self._damage_is_said():
            self._db = sqlite3.connect(self._path, check_same_thread=False)
            self._set_up()

    def _set_up(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(_SCHEMA)
        elif version != _SCHEMA_VERSION:
            raise self._unusable(f"is of another version of hintfleet (format {version})")
        (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._unusable(f"is damaged: {verdict}")

    def door(self) -> GuestAddress | None:
        """Where guests of an earlier host agent look for it; None if there was none.

        :raises Refused: the file is damaged.
        """
        with self._damage_is_said():
            row = self._db.execute("SELECT socket, address FROM door").fetchone()
        return GuestAddress(socket=row[0], address=row[1]) if row else None

    def guests(self) -> list[GuestRecord]:
        """All guests that were saved and not forgotten.

        :raises Refused: the file is damaged.
        """
        with self._damage_is_said():
            return [_record(*row) for row in self._db.execute("SELECT * FROM guest")]

    def set_door(self, door: GuestAddress) -> None:
        """Say where guests find the host agent from now on.

        :raises TransientError: the disk is full, or the like; so do `save` and `forget`.
        """
        with self._writing() as db:
            db.execute("DELETE FROM door")
            db.execute("INSERT INTO door VALUES (?, ?)", (door.socket, door.address))

    def save(self, records: Sequence[GuestRecord]) -> None:
        """Store these guests, in place of what was stored of them; all or none."""
        rows = [_row(record) for record in records]
        with self._writing() as db:
            db.executemany(_SAVE, rows)

    def forget(self, name: str) -> None:
        """A guest has ended: nothing more is to be known of it, and its files go."""
        with self._writing() as db:
            db.execute("DELETE FROM guest WHERE name = ?", (name,))
        shutil.rmtree(self.guests_folder / name, ignore_errors=True)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        try:
            with self._lock, self._db:
                yield self._db
        except sqlite3.Error as error:
            raise TransientError(f"{self._path} cannot be written: {error}") from error

    @contextlib.contextmanager
    def _damage_is_said(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, ValueError, InvalidInput, DecodeError) as error:
            raise self._unusable(f"is damaged: {error}") from error

    def _unusable(self, what: str) -> Refused:
        return Refused(
            f"the state file {self._path} {what}",
            hint=f"remove the folder {self._path.parent} and start again: its guests end by"
            " themselves, some time after they have lost their host agent (--orphan-after)",
        )


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Database]:
    """The state in `folder`, which is made if need be; for nobody else until the block ends.

    :raises Refused: another host agent has it, it is damaged, or it cannot be made.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.ExitStack() as stack:
        try:
            if not folder.exists():
                folder.mkdir(parents=True)
                folder.chmod(_FOLDER_MODE)
            stack.enter_context(_locked(folder / "lock"))
            _remove_all_but(boot, folder)
            state = Database(folder / boot)
        except OSError as error:
            raise Refused(
                f"cannot keep state in {folder}: {error.strerror}",
                hint="choose another folder with --state",
            ) from error
        stack.callback(state.close)
        yield state


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = wait_for(lambda: lock_file(path), lambda: _patience_s(path))
    if fd is None:
        raise Refused(
            f"another host agent (process {_holder(path)}) serves {path.parent}",
            hint="stop that one, or give this one a --state folder of its own",
        )
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def _holder(path: Path) -> str:
    """Return the process id that the holder of the lock wrote into it."""
    return path.read_text()[:20]


def _patience_s(path: Path) -> float:
    holder = _holder(path)
    dies = holder.isdecimal() and find_process(int(holder)) is None
    return _DEATH_TIMEOUT_S if dies else _LOCK_TIMEOUT_S


def _remove_all_but(boot: str, folder: Path) -> None:
    """What earlier boots left is about guests that are gone."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != boot and (path / "state.db").exists():
            shutil.rmtree(path, ignore_errors=True)


def _row(record: GuestRecord) -> tuple[str | bytes | int, ...]:
    books = record.books
    return (
        record.name,
        record.uuid,
        record.token,
        record.trial_id,
        record.spec.SerializeToString(),
        json.dumps(dict(record.handle)),
        record.epoch,
        books.totals.SerializeToString(),
        books.ram.pack(),
        books.reclaimed.pack(),
        books.untouched.pack(),
    )


def _record(
    name: str,
    uuid: str,
    token: str,
    trial_id: str,
    spec: bytes,
    handle: str,
    epoch: int,
    totals: bytes,
    ram: bytes,
    reclaimed: bytes,
    untouched: bytes,
) -> GuestRecord:
    return GuestRecord(
        name=name,
        uuid=uuid,
        token=token,
        trial_id=trial_id,
        spec=host_pb2.GuestSpec.FromString(spec),
        handle=json.loads(handle),
        epoch=epoch,
        books=Books(
            totals=host_pb2.Ledger.FromString(totals),
            ram=PageMap.unpack(ram),
            reclaimed=PageMap.unpack(reclaimed),
            untouched=PageMap.unpack(untouched),
        ),
    )
