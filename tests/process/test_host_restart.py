"""The guests of a host agent with --state live on when it is killed or stopped, and the next host
agent adopts them. Guests end if no host agent starts, or if nobody watches them again. A state that
cannot be used is an error."""

import asyncio
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import grpc
import pytest

from hintfleet.errors import TransientError
from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from hintfleet.v1.host_pb2_grpc import HostServiceStub
from host_agent.persistence.database import opened
from host_agent.server import Settings, serving
from tests.support.agents import HANG_S, TRIAL, HostAgent, alive, running_host_agent, wait_until

HELD = 96 * MIB
FREED = 64 * MIB
STEP = 8 * MIB
MAY_BE_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True)
class Home:
    """A folder for the socket and the state of host agents that run one after the other."""

    folder: Path

    @property
    def listen(self) -> str:
        return f"unix:{self.folder}/host.sock"

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--listen", self.listen, "--state", str(self.folder / "state"))

    def agent(
        self, *arguments: str, stderr: IO[bytes] | None = None
    ) -> AbstractContextManager[HostAgent]:
        return running_host_agent(*self.arguments, *arguments, stderr=stderr)

    def failure(self) -> str:
        """Start a host agent that must fail with exit code 1; return what it writes to stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "host_agent", *self.arguments],
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    @property
    def boot_folder(self) -> Path:
        (found,) = (p.parent for p in (self.folder / "state").glob("*/state.db"))
        return found

    def guest_files(self) -> list[str]:
        return [path.name for path in (self.boot_folder / "guests").iterdir()]


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="hf-home-") as folder:
        yield Home(Path(folder))


def kill(agent: HostAgent) -> None:
    agent.process.kill()
    agent.process.wait()


def in_session(agent: HostAgent, after_epoch: int) -> host_pb2.Guest:
    wait_until(lambda: agent.guests()["g"].epoch > after_epoch, "the guest to come back")
    return agent.guests()["g"]


def balances(books: host_pb2.Ledger) -> None:
    known = books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
    assert known == books.provisioned_bytes
    fates = books.reclaimed_total_bytes + books.absent_total_bytes
    assert books.hinted_total_bytes == fates + sum(books.skipped_total_bytes.values())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_guests_go_on_under_the_next_host_agent(home: Home, number: int) -> None:
    with home.agent() as first:
        first.watch()
        guest = first.create()
        first.allocate(HELD)
        first.free(FREED)
        books = first.settle().ledger
        first.process.send_signal(number)
        first.process.wait(HANG_S)
    assert alive(guest.pid)
    with home.agent() as second:
        assert second.guest_address == first.guest_address
        second.watch()
        found = in_session(second, after_epoch=guest.epoch)
        assert (found.pid, found.uuid, found.trial_id) == (guest.pid, guest.uuid, TRIAL)
        assert found.spec == guest.spec
        assert found.ledger == books
        assert second.verify().wrong_pages == 0
        second.free(HELD - FREED)
        after = second.settle().ledger
        balances(after)
        assert after.resident_bytes == 0
        assert after.reclaimed_total_bytes == HELD
    # At the end of the block, the lifeline of the second host agent was closed: so it has
    # destroyed its guests.
    assert not alive(guest.pid)
    assert not home.guest_files()


def test_a_guest_is_as_large_as_it_was(home: Home) -> None:
    with home.agent() as first:
        first.watch()
        guest = first.create(max_memory_bytes=384 * MIB)
        first.resize(256 * MIB)
        first.allocate(224 * MIB)
        kill(first)
    with home.agent() as second:
        second.watch()
        found = in_session(second, after_epoch=guest.epoch)
        assert found.ledger.provisioned_bytes == 256 * MIB
        second.free(224 * MIB)
        balances(second.settle().ledger)
        assert second.resize(384 * MIB).ledger.provisioned_bytes == 384 * MIB
        assert second.resize(128 * MIB).ledger.provisioned_bytes == 128 * MIB
        balances(second.settle().ledger)


class Stepper:
    """Allocates and frees in a thread until `stop`. Retries calls that fail with a status of
    MAY_BE_RETRIED."""

    def __init__(self, listen: str) -> None:
        self.steps = 0
        self.failures: list[grpc.RpcError] = []
        self._stopping = threading.Event()
        backoff = (("grpc.max_reconnect_backoff_ms", 100),)
        self._channel = grpc.insecure_channel(listen, options=backoff)
        self._stub = HostServiceStub(self._channel)
        self._pool = ThreadPoolExecutor(1)
        self._running = self._pool.submit(self._run)

    def _run(self) -> None:
        while not self._stopping.is_set():
            done = self._step(time.monotonic() + HANG_S)
            assert done.changed_bytes == STEP
            assert done.wrong_pages == 0
            self.steps += 1

    def _step(self, deadline_s: float) -> host_pb2.RunStepResponse:
        request = host_pb2.RunStepRequest(
            command=host_pb2.CommandId(trial_id=TRIAL, sequence=self.steps + 1),
            guest_name="g",
            seed=self.steps,
        )
        if self.steps % 2:
            request.free_bytes = STEP
        else:
            request.allocate_bytes = STEP
        while True:
            try:
                return self._stub.RunStep(request, timeout=HANG_S, wait_for_ready=True)
            except grpc.RpcError as error:
                self.failures.append(error)
                if error.code() not in MAY_BE_RETRIED or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)

    def stop(self) -> None:
        """Stop after the current step.

        :raises Exception: a step has failed.
        """
        self._stopping.set()
        self._running.result(HANG_S)
        self._pool.shutdown()
        self._channel.close()


def test_killed_or_stopped_during_batches_nothing_is_lost_or_done_twice(home: Home) -> None:
    rounds = int(os.environ.get("HINTFLEET_TEST_KILLS", "5"))
    chance = random.Random(4)
    with home.agent() as agent:
        agent.watch()
        guest = agent.create()
        agent.allocate(HELD)
        stepper = Stepper(home.listen)
        time.sleep(0.3)
        kill(agent)
    epoch = guest.epoch
    for _ in range(rounds):
        with home.agent() as agent:
            agent.watch()
            epoch = in_session(agent, after_epoch=epoch).epoch
            time.sleep(chance.uniform(0, 0.3))
            agent.process.send_signal(chance.choice((signal.SIGKILL, signal.SIGTERM)))
            agent.process.wait(HANG_S)
    with home.agent() as agent:
        agent.watch()
        in_session(agent, after_epoch=epoch)
        stepper.stop()
        assert stepper.failures, "no step was under way when the host agent was killed"
        assert stepper.steps > rounds
        checked = agent.verify()
        assert checked.wrong_pages == 0
        assert checked.held_bytes == HELD + STEP * (stepper.steps % 2)
        books = agent.settle().ledger
        balances(books)
        assert books.resident_bytes == checked.held_bytes


def test_a_state_serves_one_host_agent_at_a_time(home: Home) -> None:
    with home.agent() as agent:
        said = home.failure()
        assert f"another host agent (process {agent.process.pid}) serves" in said
        agent.watch()
        agent.create()
        assert agent.verify().wrong_pages == 0


def test_a_guest_whose_host_agent_stays_away_ends_by_itself(home: Home) -> None:
    with home.agent("--orphan-after", "1") as agent:
        agent.watch()
        guests = [agent.create(), agent.create("idle", method=host_pb2.NONE)]
        kill(agent)
    wait_until(lambda: not any(alive(g.pid) for g in guests), "the orphans to end")
    with home.agent() as agent:
        assert agent.guests()["g"].ledger.provisioned_bytes == 128 * MIB
        with pytest.raises(grpc.RpcError) as caught:
            agent.verify()
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert "while there was no host agent" in str(caught.value.details())
        assert "no host agent for 1 s" in str(caught.value.details())
        agent.stub.DestroyGuest(host_pb2.DestroyGuestRequest(name="g"), timeout=HANG_S)
        assert home.guest_files() == ["idle"]


def test_guests_that_nobody_watches_again_are_ended(home: Home, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with home.agent() as agent:
        agent.watch()
        agent.watch("other-trial")
        guest = agent.create()
        kill(agent)
    # On a busy machine, the guest may be ended before this host agent serves: so wait for the end,
    # and read in the log that the guest was adopted first.
    with log.open("wb") as stderr, home.agent("--watch-grace", "3", stderr=stderr) as agent:
        wait_until(lambda: not agent.guests(), "the grace to end")
        assert not alive(guest.pid)
        wait_until(lambda: not home.guest_files(), "its files to be removed")
    said = log.read_text()
    assert 0 < said.index("guest adopted") < said.index("guest ended")


def test_the_next_trial_begins_when_the_guests_of_the_one_before_are_gone(home: Home) -> None:
    """The guests of a run's trials have the same names. A host agent that is restarted in a trial
    adopts those of that trial; without this, the next one would fail, and the whole run with it."""
    with home.agent() as agent:
        agent.watch()
        guest = agent.create()
        kill(agent)
    with home.agent("--watch-grace", "3") as agent:
        agent.watch("next-trial")
        command = host_pb2.CommandId(trial_id="next-trial")
        spec = host_pb2.GuestSpec(
            driver=host_pb2.EMBEDDED, memory_bytes=128 * MIB, method=host_pb2.NONE
        )
        request = host_pb2.CreateGuestRequest(command=command, name="g", spec=spec)
        made = agent.stub.CreateGuest(request, timeout=HANG_S)
        assert made.uuid != guest.uuid
        assert not alive(guest.pid)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("policy", "lazy", "hinting has no policy 'lazy'"),
        ("method", 99, "this host agent has no method number 99"),
        ("driver", 99, "this host agent has no driver number 99"),
    ],
)
def test_a_guest_of_a_later_version_does_not_keep_others_from_being_adopted(
    home: Home, tmp_path: Path, field: str, value: str | int, said: str
) -> None:
    with home.agent() as first:
        first.watch()
        guest, odd = first.create(), first.create("odd")
        kill(first)
    with opened(home.folder / "state") as state:
        (record,) = (record for record in state.guests() if record.name == "odd")
        setattr(record.spec.hinting if field == "policy" else record.spec, field, value)
        state.save([record])
    log = tmp_path / "log"
    with log.open("wb") as stderr, home.agent(stderr=stderr) as second:
        second.watch()
        in_session(second, after_epoch=guest.epoch)
        assert second.guests().keys() == {"g"}
        wait_until(lambda: not alive(odd.pid), "the agent of the other one to be refused")
    (line,) = (line for line in log.read_text().splitlines() if "cannot be adopted" in line)
    assert "guest=odd" in line
    assert said in line
    with opened(home.folder / "state") as state:
        assert [record.name for record in state.guests()] == ["odd"]


def test_a_host_agent_can_be_stopped_while_it_adopts_guests(home: Home) -> None:
    """Here libvirt never answers, so the adoption would never end."""
    pytest.importorskip("libvirt")
    with home.agent() as first:
        first.watch()
        guest = first.create()
        kill(first)
    with opened(home.folder / "state") as state:
        real = replace(*state.guests(), name="real", uuid=str(uuid.uuid4()))
        real.spec.driver = host_pb2.LIBVIRT
        state.save([real])
    with socket.socket(socket.AF_UNIX) as libvirtd:
        libvirtd.bind(f"{home.folder}/libvirt")
        libvirtd.listen()
        libvirtd.settimeout(HANG_S)
        silent = f"qemu+unix:///system?socket={home.folder}/libvirt"
        command = [sys.executable, "-m", "host_agent", *home.arguments, "--libvirt-uri", silent]
        with subprocess.Popen(command) as second, ExitStack() as undo:
            undo.callback(second.kill)
            undo.enter_context(libvirtd.accept()[0])
            second.terminate()
            assert second.wait(HANG_S) == 0
    with home.agent("--libvirt-uri", "test:///default") as third:
        third.watch()
        in_session(third, after_epoch=guest.epoch)
        assert third.guests().keys() == {"g", "real"}
        assert third.verify().wrong_pages == 0


@contextmanager
def without_its_tables(database: Path) -> Iterator[None]:
    """Rename the table of guests until the block ends: meanwhile, no guest can be saved."""
    for old, new in (("guest", "away"), ("away", "guest")):
        with closing(sqlite3.connect(database)) as other:
            other.execute(f"ALTER TABLE {old} RENAME TO {new}")
        if new == "away":
            yield


def test_a_state_that_cannot_be_written_at_the_end_keeps_nothing_open(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()
    settings = Settings(
        name="in-process",
        listen=home.listen,
        guest_listen="127.0.0.1:0",
        memory_budget_bytes=1 << 30,
        libvirt_uri="test:///default",
        state=home.folder / "state",
    )
    spec = host_pb2.GuestSpec(
        driver=host_pb2.EMBEDDED, memory_bytes=128 * MIB, method=host_pb2.NONE
    )

    async def serve_and_fail() -> None:
        async with serving(settings) as served:
            served.registry.trials.open_watch(TRIAL)
            await served.registry.create("g", TRIAL, spec)
            driver = served.registry.drivers[host_pb2.LIBVIRT]
            monkeypatch.setattr(driver, "close", closed.set)
            broken.enter_context(without_its_tables(home.boot_folder / "state.db"))

    async def serve_and_end() -> None:
        async with serving(settings) as served:
            assert [guest.name for guest in served.registry.guests] == ["g"]
            await served.registry.end_all()

    with ExitStack() as broken, pytest.raises(TransientError, match="no such table"):
        asyncio.run(serve_and_fail())
    has_socket = (home.folder / "host.sock").exists()
    asyncio.run(serve_and_end())
    assert closed.is_set()
    assert not has_socket


def test_a_damaged_state_is_an_error_that_says_what_to_do(home: Home) -> None:
    with home.agent() as agent:
        kill(agent)
    for path in home.boot_folder.glob("state.db*"):
        path.write_bytes(random.Random(1).randbytes(20_000))
    said = home.failure()
    assert "state.db is damaged" in said
    assert f"remove the folder {home.boot_folder}" in said


def test_an_address_that_another_process_took_is_an_error(home: Home) -> None:
    with home.agent() as agent:
        address = agent.guest_address
        kill(agent)
    with running_host_agent("--guest-listen", address):
        assert f"cannot listen on {address}" in home.failure()
