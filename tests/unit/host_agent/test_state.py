"""What is stored for the next host agent, in real files, and the lock on them."""

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from hintfleet.errors import HintfleetError, Refused, TransientError
from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from host_agent.memory.ledger import Books
from host_agent.memory.page_map import PageMap
from host_agent.persistence.database import Database, GuestRecord, opened
from host_agent.persistence.saver import Saver
from host_agent.session.gate import Epochs
from host_agent.session.guest_address import GuestAddress
from tests.support.agents import HANG_S


def a_guest(name: str = "g", epoch: int = 5) -> GuestRecord:
    return GuestRecord(
        name=name,
        uuid="5b9d0f0e-0000-4000-8000-00000000b157",
        token="secret",
        trial_id="t",
        spec=host_pb2.GuestSpec(driver=host_pb2.EMBEDDED, memory_bytes=128 * MIB),
        handle={"pid": 4711, "start_ticks": 1 << 40},
        epoch=epoch,
        books=Books(
            totals=host_pb2.Ledger(hinted_total_bytes=4096, skipped_total_bytes={"stale": 4096}),
            ram=PageMap([(0, 8192)]),
            reclaimed=PageMap(),
            untouched=PageMap([(0, 512), (1024, 1), (4096, 4096)]),
        ),
    )


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    door = GuestAddress(socket="unix-abstract:x", address="127.0.0.1:20000")
    with opened(tmp_path / "new" / "state") as state:
        assert state.guest_address() is None
        assert state.guests() == []
        state.set_guest_address(GuestAddress(socket="unix-abstract:y", address="127.0.0.1:1"))
        state.set_guest_address(door)
        state.save([a_guest("one"), a_guest("two", epoch=5)])
        state.save([a_guest("two", epoch=6), a_guest("three")])
        state.forget("three")
    with opened(tmp_path / "new" / "state") as state:
        assert state.guest_address() == door
        assert state.guests() == [a_guest("one"), a_guest("two", epoch=6)]


def test_no_other_user_can_read_the_state(tmp_path: Path) -> None:
    with opened(tmp_path / "state") as state:
        state.save([a_guest()])
        found = list((tmp_path / "state").rglob("*"))
        assert {path.name for path in found} > {"lock", "state.db", "state.db-wal", "guests"}
        for path in found:
            assert path.stat().st_mode & 0o777 == (0o711 if path.is_dir() else 0o600), path


def test_a_forgotten_guest_has_no_files(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        folder = state.guests_folder / "g"
        folder.mkdir()
        (folder / "log").write_text("last words")
        state.save([a_guest()])
        state.forget("g")
        assert not folder.exists()


def test_what_another_boot_of_the_host_left_is_not_read(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        state.save([a_guest()])
        boot = state.guests_folder.parent
    earlier = boot.rename(tmp_path / "an-earlier-boot")
    (earlier / "state.db").write_text("torn by a power failure")
    with opened(tmp_path) as state:
        assert state.guests() == []
        assert not earlier.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE guest SET untouched = x'0080'", "damaged: packed pages: truncated"),
        ("UPDATE guest SET spec = x'ff'", "damaged"),
        ("UPDATE guest SET handle = '{'", "damaged"),
        ("DROP TABLE guest", "damaged: no such table"),
        ("PRAGMA user_version = 7", "another version of hintfleet \\(format 7\\)"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused(tmp_path: Path, change: str, said: str) -> None:
    with opened(tmp_path) as state:
        state.save([a_guest()])
        (path,) = tmp_path.glob("*/state.db")
    database = sqlite3.connect(path)
    with database:
        database.execute(change)
    database.close()
    with pytest.raises(Refused, match=said) as caught, opened(tmp_path) as state:
        state.guests()
    assert str(path.parent) in caught.value.hint
    assert path.exists(), "a state that cannot be used is kept for inspection"


def test_a_state_that_somebody_reads_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice for a damaged one is to remove it, and with it all guests."""
    with opened(tmp_path):
        (path,) = tmp_path.glob("*/state.db")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.1}))
    with closing(connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(HintfleetError) as caught, opened(tmp_path):
            pass
    assert "locked" in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_a_full_disk_is_not_taken_for_a_damaged_state(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        state.save([a_guest()])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # SQLite cannot make its -shm file of 32 KiB then, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(Refused, match="cannot be opened: disk I/O error") as caught,
            opened(tmp_path),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "remove" not in caught.value.hint
    with opened(tmp_path) as state:
        assert [guest.name for guest in state.guests()] == [a_guest().name]


def make_older(folder: Path, guest: GuestRecord) -> Path:
    """Make a state folder with one guest in format 2, which has no column for the books of an
    attached domain's earlier starts; return the folder's database file."""
    with opened(folder) as state:
        state.save([guest])
        (path,) = folder.glob("*/state.db")
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE guest DROP COLUMN earlier")
        database.execute("PRAGMA user_version = 2")
    return path


def test_the_guests_of_an_older_state_are_kept(tmp_path: Path) -> None:
    make_older(tmp_path, a_guest())
    later = replace(a_guest("later"), earlier=host_pb2.Ledger(hinted_total_bytes=8192))
    with opened(tmp_path) as state:
        assert state.guests() == [a_guest()]
        state.save([later])
    with opened(tmp_path) as state:
        assert state.guests() == [a_guest(), later]


CUT_SHORT = """
import os, sqlite3, sys
from pathlib import Path
from host_agent.persistence.database import opened

connect = sqlite3.connect

def die_before_the_version_is_set(statement):
    if "PRAGMA user_version =" in statement:
        os._exit(9)

def traced(*args, **kwargs):
    connection = connect(*args, **kwargs)
    connection.set_trace_callback(die_before_the_version_is_set)
    return connection

sqlite3.connect = traced
with opened(Path(sys.argv[1])):
    pass
"""


def test_a_host_agent_that_is_killed_while_it_changes_an_older_state_leaves_it_whole(
    tmp_path: Path,
) -> None:
    path = make_older(tmp_path, a_guest())
    killed = subprocess.run([sys.executable, "-c", CUT_SHORT, str(tmp_path)], check=False)
    assert killed.returncode == 9
    with closing(sqlite3.connect(path)) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(guest)")]
        assert "earlier" not in columns
    with opened(tmp_path) as state:
        assert state.guests() == [a_guest()]


class Saved:
    """A guest as the Saver needs it: it only has a name and a record."""

    name = "g"

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def record(self) -> GuestRecord:
        return a_guest(epoch=self._epoch)


def rename(path: Path, old: str, new: str) -> None:
    """Rename a table, as another program could: without its table, nothing can be saved."""
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"ALTER TABLE {old} RENAME TO {new}")


async def until_saved(state: Database) -> int:
    """Return the epoch of the one guest that is saved, once one is."""
    async with asyncio.timeout(HANG_S):
        while not (found := state.guests()):
            await asyncio.sleep(0.01)
    return found[0].epoch


def test_what_could_not_be_saved_is_saved_later(tmp_path: Path) -> None:
    async def scenario(state: Database, path: Path) -> None:
        saver = Saver(state)
        rename(path, "guest", "away")
        with pytest.raises(TransientError):
            await saver.save(Saved(epoch=5))
        rename(path, "away", "guest")
        running = asyncio.create_task(saver.run())
        assert await until_saved(state) == 5
        running.cancel()

    with opened(tmp_path) as state:
        (path,) = tmp_path.glob("*/state.db")
        asyncio.run(scenario(state, path))


def test_a_save_that_failed_does_not_displace_a_later_guest_of_the_name(tmp_path: Path) -> None:
    async def scenario(state: Database, path: Path) -> None:
        saver = Saver(state)
        rename(path, "guest", "away")
        saving = asyncio.create_task(saver.save(Saved(epoch=5)))
        while not saver._write_lock.locked():
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # the write runs in a thread now
        saver.changed(Saved(epoch=6))
        with pytest.raises(TransientError):
            await saving
        rename(path, "away", "guest")
        await saver.save_changed()
        assert await until_saved(state) == 6

    with opened(tmp_path) as state:
        (path,) = tmp_path.glob("*/state.db")
        asyncio.run(scenario(state, path))


PUNCHER = """
import os, sys, threading, time
from array import array
from pathlib import Path
from host_agent.memory.fence import Fence
from host_agent.memory.punch import punch
from host_agent.persistence.database import opened

fd, size_bytes = int(sys.argv[2]), int(sys.argv[3])
fence = Fence()
ranges = [array("q", [0]), array("q", [size_bytes])]
with opened(Path(sys.argv[1])):
    threading.Thread(target=punch, args=[fd, *ranges, fence.closed_times, fence.permit()]).start()
    time.sleep(60)
"""


def test_the_lock_is_held_until_a_punch_of_a_killed_process_is_over(tmp_path: Path) -> None:
    size_bytes = 512 * MIB
    fd = os.memfd_create("ram")
    for at in range(0, size_bytes, MIB):
        os.pwrite(fd, b"\1" * MIB, at)

    def resident_bytes() -> int:
        return os.fstat(fd).st_blocks * 512

    arguments = (str(tmp_path), str(fd), str(size_bytes))
    with subprocess.Popen([sys.executable, "-c", PUNCHER, *arguments], pass_fds=[fd]) as process:
        while resident_bytes() == size_bytes:  # the test's timeout bounds this
            assert process.poll() is None
        process.kill()
        with opened(tmp_path):
            assert resident_bytes() == 0
    os.close(fd)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(Refused, match=r"cannot keep state in .*: Not a directory"),
        opened(tmp_path / "file" / "state"),
    ):
        pass


def test_epochs_grow_also_when_the_clock_was_set_back() -> None:
    ahead = Epochs().next() + 3600 * 1_000_000
    epochs = Epochs()
    epochs.after(ahead)
    epochs.after(ahead - 1)
    assert epochs.next() == ahead + 1
