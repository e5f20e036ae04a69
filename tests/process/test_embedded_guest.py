"""An embedded guest under a real host agent: memory that it frees comes back to the host if it
hints, the books and samples agree, impossible requests are refused, and guests end with their Watch
or their host agent."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import grpc
import pytest

from hintfleet.units import MIB
from hintfleet.v1 import host_pb2
from hintfleet.v1.hinting_pb2 import Loop
from tests.support.agents import HANG_S, TRIAL, HostAgent, alive, wait_until

HELD = 96 * MIB
FREED = 64 * MIB


def test_freed_memory_leaves_the_host_and_what_is_held_stays(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    assert host_agent.allocate(HELD).held_bytes == HELD
    assert host_agent.guests()["g"].ledger.resident_bytes == HELD
    assert host_agent.free(FREED).wrong_pages == 0
    books = host_agent.settle().ledger
    assert books.resident_bytes == HELD - FREED
    assert books.reclaimed_now_bytes == FREED
    checked = host_agent.verify()
    assert checked.verified_pages == (HELD - FREED) // 4096
    assert checked.wrong_pages == 0


def test_freed_memory_leaves_without_being_asked(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    host_agent.allocate(HELD)
    host_agent.free(FREED)
    wait_until(
        lambda: host_agent.guests()["g"].ledger.resident_bytes == HELD - FREED,
        "hinting to reclaim what was freed",
    )


def test_without_hinting_freed_memory_stays(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create(method=host_pb2.NONE)
    host_agent.allocate(HELD)
    host_agent.free(FREED)
    time.sleep(1)
    assert host_agent.guests()["g"].ledger.resident_bytes == HELD


def test_the_memory_of_a_guest_that_was_killed_is_free_at_once(host_agent: HostAgent) -> None:
    """While the host agent held its RAM, a kernel that was out of memory killed one guest after the
    other, and got nothing for it."""
    host_agent.watch()
    killed, kept = host_agent.create(), host_agent.create("kept")
    host_agent.allocate(HELD)
    host_agent.allocate(HELD, "kept")

    def held() -> list[str]:
        found = []
        for descriptor in Path(f"/proc/{host_agent.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(descriptor))
        return [path for path in found if "hintfleet-" in path]

    assert len(held()) == 2
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: len(held()) == 1, "the memory to be free")
    assert alive(kept.pid)
    assert host_agent.verify("kept").wrong_pages == 0
    books = host_agent.guests()["g"].ledger
    assert (books.resident_bytes, books.untouched_bytes) == (0, 0)
    names = [sample.guest_name for sample in host_agent.samples[-1].samples]
    wait_until(lambda: host_agent.samples[-1].samples[0].guest_name == "kept", f"{names}")


def test_an_agent_takes_no_huge_pages(host_agent: HostAgent) -> None:
    """From Linux 6.18 on, the kernel refuses only huge pages that the agent does not ask for, and
    /proc/PID/status does not show that: then check that the agent has none."""
    host_agent.watch()
    process = Path(f"/proc/{host_agent.create().pid}")
    refused = "THP_enabled:\t0\n" in (process / "status").read_text()
    takes_none = re.search(r"^AnonHugePages: +0 kB$", (process / "smaps_rollup").read_text(), re.M)
    assert refused or takes_none


def test_the_books_balance_over_many_rounds(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    for _ in range(6):
        host_agent.allocate(HELD)
        assert host_agent.free(HELD).wrong_pages == 0
        books = host_agent.settle().ledger
        resident_by_the_books = (
            books.provisioned_bytes - books.reclaimed_now_bytes - books.untouched_bytes
        )
        assert books.resident_bytes == resident_by_the_books == 0
        fates = books.reclaimed_total_bytes + books.absent_total_bytes
        assert books.hinted_total_bytes == fates + sum(books.skipped_total_bytes.values())
    assert books.reclaimed_total_bytes == 6 * HELD
    assert books.refaulted_total_bytes > 0, "later rounds refault what was reclaimed"


def test_a_sample_is_of_the_moment_and_after_a_verification_of_audited_books(
    host_agent: HostAgent,
) -> None:
    host_agent.watch()
    host_agent.create(method=host_pb2.NONE)
    host_agent.allocate(HELD)
    host_agent.verify()
    before = len(host_agent.samples)
    # The next sample may be older than the verification; the one after it is not.
    wait_until(lambda: len(host_agent.samples) >= before + 2, "samples")
    books = host_agent.samples[before + 1].samples[0].ledger
    assert books.resident_bytes == HELD
    assert books.untouched_bytes == books.provisioned_bytes - HELD
    assert host_agent.samples[-1].observing_cpu_us > 0


def test_samples_agree_with_the_books(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    began_s = time.time()
    host_agent.allocate(HELD)
    wait_until(
        lambda: host_agent.samples[-1].samples[0].ledger.resident_bytes == HELD, "a sample of it"
    )
    sample = host_agent.samples[-1]
    assert began_s < sample.at_unix_us / 1e6 < time.time()
    wait_until(lambda: host_agent.samples[-1].samples[0].agent_rss_bytes > 0, "telemetry")
    assert host_agent.samples[-1].samples[0].tracker_bytes > 0


def test_free_memory_between_fragments_is_in_no_chunk_and_stays(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create("order9")
    host_agent.create("order4", hinting=host_pb2.HintingSettings(chunk_order=4))
    left = {}
    for name in ("order9", "order4"):
        host_agent.allocate(HELD, name, block_bytes=64 << 10)
        assert host_agent.free(HELD // 2, name).wrong_pages == 0
        left[name] = host_agent.settle(name).ledger.resident_bytes
        assert host_agent.verify(name).wrong_pages == 0
    assert left == {"order9": HELD, "order4": HELD // 2}


@pytest.mark.parametrize("pattern", [Loop.CHURN, Loop.FAULT, Loop.BANDWIDTH])
def test_a_loop_runs_beside_hinting_and_harms_nothing(
    host_agent: HostAgent, pattern: Loop.Pattern.ValueType
) -> None:
    host_agent.watch()
    host_agent.create()
    host_agent.allocate(32 * MIB)
    done = host_agent.loop(pattern, size_bytes=32 * MIB, duration_ms=1500, pause_ms=300)
    assert (done.held_bytes, done.changed_bytes, done.wrong_pages) == (32 * MIB, 0, 0)
    assert done.duration_us >= 1_500_000
    assert done.looped.touched_bytes > 0
    assert host_agent.settle().ledger.resident_bytes == 32 * MIB, "the loop's memory came back"
    assert host_agent.verify().wrong_pages == 0


def test_more_than_the_guest_has_is_refused_and_harms_nothing(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    with pytest.raises(grpc.RpcError) as caught:
        host_agent.allocate(256 * MIB)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "out of memory" in str(caught.value.details())
    assert host_agent.verify().wrong_pages == 0


def test_a_retried_command_is_answered_and_not_done_again(host_agent: HostAgent) -> None:
    host_agent.watch()
    host_agent.create()
    command = host_pb2.CommandId(run_id="r", trial_id=TRIAL, sequence=7)
    request = host_pb2.RunStepRequest(
        command=command, guest_name="g", allocate_bytes=8 * MIB, seed=1
    )
    first = host_agent.stub.RunStep(request, timeout=HANG_S)
    assert host_agent.stub.RunStep(request, timeout=HANG_S) == first
    assert host_agent.verify().held_bytes == 8 * MIB


def test_guests_die_with_the_watch_of_their_trial(host_agent: HostAgent) -> None:
    watch = host_agent.watch()
    pid = host_agent.create().pid
    watch.cancel()
    wait_until(lambda: not host_agent.guests(), "the host agent to destroy them")
    assert not alive(pid)


def test_guests_die_with_a_host_agent_that_is_killed(host_agent: HostAgent) -> None:
    host_agent.watch()
    pid = host_agent.create().pid
    host_agent.process.kill()
    wait_until(lambda: not alive(pid), "the guest to notice")


def test_a_guest_that_dies_is_reported_with_the_end_of_its_output(host_agent: HostAgent) -> None:
    host_agent.watch()
    guest = host_agent.create()
    os.kill(guest.pid, signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as caught:
        host_agent.verify()
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert "status -9" in str(caught.value.details())
    host_agent.stub.DestroyGuest(host_pb2.DestroyGuestRequest(name="g"), timeout=HANG_S)
    host_agent.create()
    assert host_agent.verify().wrong_pages == 0


def test_destroying_returns_the_closed_books_and_the_memory(host_agent: HostAgent) -> None:
    host_agent.watch()
    pid = host_agent.create().pid
    host_agent.allocate(HELD)
    closed = host_agent.stub.DestroyGuest(host_pb2.DestroyGuestRequest(name="g"), timeout=HANG_S)
    assert closed.ledger.resident_bytes == HELD
    assert not alive(pid)
    open_files = os.listdir(f"/proc/{host_agent.process.pid}/fd")
    links = [os.readlink(f"/proc/{host_agent.process.pid}/fd/{n}") for n in open_files]
    assert not [link for link in links if "memfd:hintfleet" in link]


@pytest.mark.parametrize(
    ("name", "memory_bytes", "code", "said"),
    [
        ("no good", 128 * MIB, grpc.StatusCode.INVALID_ARGUMENT, "letters, digits"),
        ("g", 5000, grpc.StatusCode.INVALID_ARGUMENT, "whole MiB"),
        ("g", 1 << 62, grpc.StatusCode.FAILED_PRECONDITION, "4194304 TiB is more than"),
    ],
)
def test_impossible_guests_are_refused(
    host_agent: HostAgent, name: str, memory_bytes: int, code: grpc.StatusCode, said: str
) -> None:
    host_agent.watch()
    spec = host_pb2.GuestSpec(
        driver=host_pb2.EMBEDDED, memory_bytes=memory_bytes, method=host_pb2.HINTING
    )
    request = host_pb2.CreateGuestRequest(
        command=host_pb2.CommandId(trial_id=TRIAL), name=name, spec=spec
    )
    with pytest.raises(grpc.RpcError, match=said) as caught:
        host_agent.stub.CreateGuest(request, timeout=HANG_S)
    assert caught.value.code() is code
    assert not host_agent.guests()


def test_a_guest_needs_a_watch(host_agent: HostAgent) -> None:
    with pytest.raises(grpc.RpcError, match="Watch") as caught:
        host_agent.create()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
