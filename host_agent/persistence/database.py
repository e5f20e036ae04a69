"""The state that outlives the host agent's process: its guests' books and how to find the guests.

The books are in one SQLite file, for one host agent at a time; beside it is a folder for each
guest's own files. The process holds a lock (flock) while it uses the state. The lock makes I2 hold
over a restart: the process that holds the lock knows that no batch of an earlier host agent is
running or can ever run.

The file must outlive the process. It need not outlive a power failure, which ends the guests as
well. So each boot of the host has its own folder, and folders of earlier boots are removed unread.

The SQLite file contains tokens, so only its owner can read it. Other users can enter the folders
but not list them: QEMU's user must reach the files of its guests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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

# How long to wait for the lock while its holder lives: the holder may be about to end.
_LOCK_TIMEOUT_S = 1.0

# How long to wait for the lock after its holder was killed: one of the holder's threads may still
# be in the kernel, punching a hole. 4 GiB take seconds on a busy host.
_DEATH_TIMEOUT_S = 60.0

# What the machine refused (sqlite.org/rescode.html): the file need not be damaged. A full disk is
# an I/O error, too, when SQLite enlarges its -shm file.
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)

_FOLDER_MODE = 0o711
_SCHEMA_VERSION = 3
_SCHEMA = f"""
    BEGIN;
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
        untouched BLOB NOT NULL,  -- PageMap.pack
        earlier BLOB NOT NULL     -- hintfleet.v1.Ledger
    ) STRICT;
    PRAGMA user_version = {_SCHEMA_VERSION};
    COMMIT;
"""
_BEFORE_EARLIER = 2
_ADD_EARLIER = f"""
    BEGIN;
    ALTER TABLE guest ADD COLUMN earlier BLOB NOT NULL DEFAULT x'';
    PRAGMA user_version = {_SCHEMA_VERSION};
    COMMIT;
"""
_SAVE = "INSERT OR REPLACE INTO guest VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, kw_only=True)
class GuestRecord:
    """One guest as it is stored.

    :ivar earlier: closed books of earlier starts of an attached domain, summed.
    """

    name: str
    uuid: str
    token: str
    trial_id: str
    spec: host_pb2.GuestSpec
    handle: Handle
    epoch: int
    books: Books
    earlier: host_pb2.Ledger = field(default_factory=host_pb2.Ledger)


class Database:
    """An open state folder. Methods block, and may be called from any thread.

    :ivar guests_folder: has a folder for each guest's own files.
    :ivar doors_folder: for the sockets of memory doors; empty at first.
    """

    def __init__(self, folder: Path) -> None:
        """Call `opened` instead: it holds the lock on the state."""
        self._path = folder / "state.db"
        self.guests_folder = folder / "guests"
        # The sockets are not in the folder of the boot, whose name is long: the path of a socket
        # has 107 bytes at most (unix(7)).
        self.doors_folder = folder.parent / "doors"
        shutil.rmtree(self.doors_folder, ignore_errors=True)
        for made in (folder, self.guests_folder, self.doors_folder):
            made.mkdir(exist_ok=True)
            made.chmod(_FOLDER_MODE)  # the umask would cut down a mode that is given to mkdir
        # Make the SQLite file before SQLite does, for its owner only. SQLite gives its journal
        # files the same mode (os_unix.c: findCreateFileMode).
        self._path.touch(mode=0o600)
        self._lock = Lock()
        with self._refusing_damage():
            # The check of Python's sqlite3 for one thread is off: `asyncio.to_thread` may call from
            # another thread each time. `_lock` lets one thread write at a time.
            self._db = sqlite3.connect(self._path, check_same_thread=False)
            self._set_up()

    def _set_up(self) -> None:
        # WAL without fsync: with synchronous=OFF data survive a crash of the program, but maybe not
        # of the machine (sqlite.org/pragma.html). Guests do not survive a crash of the machine.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(_SCHEMA)
        elif version == _BEFORE_EARLIER:
            self._db.executescript(_ADD_EARLIER)
        elif version != _SCHEMA_VERSION:
            raise self._unusable(f"is of another version of hintfleet (format {version})")
        (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._unusable(f"is damaged: {verdict}")

    def guest_address(self) -> GuestAddress | None:
        """Return the address that `set_guest_address` stored last, in this host agent or an earlier
        one of this boot; None if there is none.

        :raises Refused: the file is damaged or cannot be read.
        """
        with self._refusing_damage():
            row = self._db.execute("SELECT socket, address FROM door").fetchone()
        return GuestAddress(socket=row[0], address=row[1]) if row else None

    def guests(self) -> list[GuestRecord]:
        """Return all guests that were saved and not forgotten.

        :raises Refused: the file is damaged or cannot be read.
        """
        with self._refusing_damage():
            return [_record(*row) for row in self._db.execute("SELECT * FROM guest")]

    def set_guest_address(self, guest_address: GuestAddress) -> None:
        """Store where this host agent listens for guests.

        :raises TransientError: the file cannot be written: the disk is full, for example.
        """
        row = (guest_address.socket, guest_address.address)
        with self._writing() as db:
            db.execute("DELETE FROM door")
            db.execute("INSERT INTO door VALUES (?, ?)", row)

    def save(self, records: Sequence[GuestRecord]) -> None:
        """Store these guests, and replace their records if there are any. Store all or none.

        :raises TransientError: the file cannot be written.
        """
        rows = [_row(record) for record in records]
        with self._writing() as db:
            db.executemany(_SAVE, rows)

    def forget(self, name: str) -> None:
        """Remove the record of a guest that has ended, and the guest's files.

        :raises TransientError: the file cannot be written; nothing is removed.
        """
        with self._writing() as db:
            db.execute("DELETE FROM guest WHERE name = ?", (name,))
        shutil.rmtree(self.guests_folder / name, ignore_errors=True)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction; no other thread writes meanwhile.

        :raises TransientError: the file cannot be written; nothing was stored.
        """
        try:
            with self._lock, self._db:
                yield self._db
        except sqlite3.Error as error:
            raise TransientError(f"{self._path} cannot be written: {error}") from error

    @contextlib.contextmanager
    def _refusing_damage(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, ValueError, InvalidInput, DecodeError) as error:
            # An error of the module sqlite3 itself has no code. The low byte is the primary code.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_DAMAGE:
                raise Refused(
                    f"the state file {self._path} cannot be opened: {error}",
                    hint="make room on its disk if that is full, and check that the disk can be"
                    " written and that nobody else has the file open; keep the file, so that the"
                    " guests can be adopted",
                ) from error
            raise self._unusable(f"is damaged: {error}") from error

    def _unusable(self, what: str) -> Refused:
        return Refused(
            f"the state file {self._path} {what}",
            hint=f"remove the folder {self._path.parent} and start again: guests that were made end"
            " by themselves, some time after they have lost their host agent (--orphan-after);"
            " attached domains are attached again by `hintfleet attach`",
        )


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Database]:
    """Open the state in `folder` until the block ends; no other process can open it meanwhile. Make
    a missing folder, and remove the state of earlier boots.

    :raises Refused: another host agent has the state open, or the state is damaged, has a format
        that this version does not know, or cannot be made or opened.
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
    # flock(2): when a process is killed, the kernel finishes a punch that one of its threads is in,
    # and releases the lock only when the last thread has ended, because threads share one table of
    # files (kernel/exit.c: exit_files). Not fcntl(2): the process would lose that lock whenever it
    # closes any descriptor of the file.
    fd = wait_for(lambda: lock_file(path), lambda: _lock_timeout_s(path))
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
    """Return what the holder of the lock, or the holder before it, has written into the file: its
    process id. Empty if the file has none."""
    return path.read_text()[:20]


def _lock_timeout_s(path: Path) -> float:
    holder = _holder(path)
    # If the holder is gone, but the file is still locked, one of the holder's threads is still in
    # the kernel.
    is_dying = holder.isdecimal() and find_process(int(holder)) is None
    return _DEATH_TIMEOUT_S if is_dying else _LOCK_TIMEOUT_S


def _remove_all_but(boot: str, folder: Path) -> None:
    """Remove the state of all boots except `boot`: the guests of earlier boots are gone."""
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
        record.earlier.SerializeToString(),
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
    earlier: bytes,
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
        earlier=host_pb2.Ledger.FromString(earlier),
    )
