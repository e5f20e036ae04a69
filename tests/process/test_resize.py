"""Memory of an embedded guest is plugged and unplugged, with and without hinting. Sizes that are
impossible, or that memory in use does not allow, are refused."""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from tests.support.agents import HANG_S, TRIAL, HostAgent

START = 128 * MIB
HALF = 256 * MIB
MOST = 384 * MIB


@pytest.fixture(params=["bitmap", "reported"])
def resizable(request: pytest.FixtureRequest, host_agent: HostAgent) -> HostAgent:
    host_agent.watch()
    hinting = host_pb2.HintingSettings(tracker=request.param)
    host_agent.create(hinting=hinting, max_memory_bytes=MOST)
    return host_agent


def check_balance(books: host_pb2.Ledger) -> None:
    assert (
        books.resident_bytes + books.reclaimed_now_bytes + books.untouched_bytes
        == books.provisioned_bytes
    )
    assert books.reclaimed_now_bytes == (
        books.reclaimed_total_bytes - books.refaulted_total_bytes - books.unplugged_total_bytes
    )
    fates = books.reclaimed_total_bytes + books.absent_total_bytes
    assert books.hinted_total_bytes == fates + sum(books.skipped_total_bytes.values())


def test_memory_is_plugged_hinted_and_unplugged(resizable: HostAgent) -> None:
    assert resizable.resize(MOST).ledger.provisioned_bytes == MOST
    resizable.allocate(300 * MIB)
    assert resizable.free(300 * MIB).wrong_pages == 0
    books = resizable.settle().ledger
    assert books.resident_bytes == 0
    assert books.reclaimed_now_bytes == 300 * MIB
    check_balance(books)

    books = resizable.resize(START).ledger
    assert books.provisioned_bytes == START
    assert books.unplugged_total_bytes > 150 * MIB
    check_balance(books)
    with pytest.raises(grpc.RpcError, match="out of memory"):
        resizable.allocate(HALF)
    assert resizable.free(START).wrong_pages == 0
    books = resizable.settle().ledger
    assert books.resident_bytes == 0
    assert "outside_ram" not in books.skipped_total_bytes, "offline memory was hinted"
    check_balance(books)


def test_memory_in_use_cannot_be_taken_away(resizable: HostAgent) -> None:
    resizable.resize(HALF)
    resizable.allocate(200 * MIB)
    with pytest.raises(grpc.RpcError, match="in use") as caught:
        resizable.resize(START)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    books = resizable.guests()["g"].ledger
    assert books.provisioned_bytes == HALF
    assert books.resident_bytes == 200 * MIB
    check_balance(books)
    assert resizable.verify().wrong_pages == 0


def test_memory_is_plugged_and_unplugged_while_the_guest_works(resizable: HostAgent) -> None:
    with working(resizable):
        for _ in range(8):
            resizable.resize(HALF)
            check_settled_size(resizable, HALF)
            shrink_when_possible(resizable)
    assert resizable.verify().wrong_pages == 0
    resizable.free(START)
    books = resizable.settle().ledger
    assert books.resident_bytes == 0
    assert "outside_ram" not in books.skipped_total_bytes
    check_balance(books)


@contextmanager
def working(host: HostAgent) -> Iterator[None]:
    """Allocate and free in a thread until the block ends; then check that no page was wrong."""
    stop = threading.Event()
    wrong: list[int] = []

    def work() -> None:
        while not stop.is_set():
            host.allocate(60 * MIB)
            wrong.append(host.free(60 * MIB).wrong_pages)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(HANG_S)
    assert wrong
    assert not any(wrong)


def check_settled_size(host: HostAgent, provisioned_bytes: int) -> None:
    assert host.guests()["g"].ledger.provisioned_bytes == provisioned_bytes


def shrink_when_possible(host: HostAgent) -> None:
    """Unplug down to START. Retry, because memory that the workload is using stays plugged."""
    for _ in range(200):
        with contextlib.suppress(grpc.RpcError):
            host.resize(START)
            return
        check_settled_size(host, HALF)
    raise AssertionError("unplugging was never possible")


def test_unplugging_frees_the_memory(host_agent: HostAgent) -> None:
    """The guest does not hint, so only unplugging gives its memory back to the host."""
    host_agent.watch()
    host_agent.create(method=host_pb2.NONE, max_memory_bytes=HALF)
    host_agent.resize(HALF)
    host_agent.allocate(200 * MIB)
    host_agent.free(200 * MIB)
    assert host_agent.guests()["g"].ledger.resident_bytes == 200 * MIB
    books = host_agent.resize(START).ledger
    assert books.resident_bytes <= START
    assert books.reclaimed_now_bytes == 0
    check_balance(books)
    folder = f"/proc/{host_agent.process.pid}/fd"
    files = [f"{folder}/{n}" for n in os.listdir(folder)]
    (ram,) = [f for f in files if "memfd:hintfleet" in os.readlink(f)]
    assert os.stat(ram).st_blocks * 512 == books.resident_bytes
    assert host_agent.verify().wrong_pages == 0


def test_a_retried_resize_is_answered_and_not_done_again(resizable: HostAgent) -> None:
    command = host_pb2.CommandId(run_id="r", trial_id=TRIAL, sequence=1)
    first = resizable.resize(HALF, command=command)
    resizable.resize(START)
    assert resizable.resize(HALF, command=command) == first
    assert resizable.guests()["g"].ledger.provisioned_bytes == START


@pytest.mark.parametrize(
    ("memory_bytes", "code", "said"),
    [
        (MOST + 128 * MIB, grpc.StatusCode.INVALID_ARGUMENT, "more than its maximum of 384 MiB"),
        (64 * MIB, grpc.StatusCode.INVALID_ARGUMENT, "64 MiB is less than the 128 MiB"),
        (200 * MIB, grpc.StatusCode.INVALID_ARGUMENT, "75497472 bytes more than .* 128 MiB"),
    ],
)
def test_impossible_sizes_are_refused(
    host_agent: HostAgent, memory_bytes: int, code: grpc.StatusCode, said: str
) -> None:
    host_agent.watch()
    host_agent.create(max_memory_bytes=MOST)
    with pytest.raises(grpc.RpcError, match=said) as caught:
        host_agent.resize(memory_bytes)
    assert caught.value.code() is code
    assert host_agent.guests()["g"].ledger.provisioned_bytes == START


def test_a_guest_of_fixed_size(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    with pytest.raises(grpc.RpcError, match="cannot be resized") as caught:
        host_agent.resize(HALF)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_an_impossible_maximum_is_refused(host_agent: HostAgent) -> None:
    host_agent.watch()
    with pytest.raises(grpc.RpcError, match="no multiple of 128 MiB"):
        host_agent.create(max_memory_bytes=200 * MIB)
    with pytest.raises(
        grpc.RpcError, match=r"is more than the \S+ .iB (on this machine|in cgroup)"
    ):
        host_agent.create(max_memory_bytes=1 << 62)
    assert not host_agent.guests()
