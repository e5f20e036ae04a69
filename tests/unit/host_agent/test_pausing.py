"""A pause of a guest's hinting: what the guest is told, when it ends, and who is told of it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from hintfleet.errors import GuestLost, InvalidInput, Refused
from hintfleet.settings import MOST_PAUSE_MS
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.api import metrics
from host_agent.guest import Guest, pause_hinting
from host_agent.registry import Registry
from host_agent.session.gate import Epochs
from host_agent.session.stream import Stream

ADAPTIVE = pb.Policy.ADAPTIVE
NOTHING = pb.Policy(kind=pb.Policy.PRESSURE, report_period_ms=100)


def made(method: host_pb2.Method.ValueType = host_pb2.HINTING, policy: str = "") -> Guest:
    spec = host_pb2.GuestSpec(method=method, hinting=host_pb2.HintingSettings(policy=policy))
    return Guest(name="g", uuid="u", token="t", trial_id="t", spec=spec)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def connected(guest: Guest, epochs: Epochs) -> tuple[int, Stream, pb.Policy]:
    """Connect the guest's agent; return its session, its stream, and the policy in the Welcome."""
    stream = Stream()
    session = guest.sessions.connect_hinting(stream, epochs)
    return session, stream, (await next_message(stream)).welcome.policy


async def next_message(stream: Stream) -> pb.HostMessage:
    message = await stream.next()
    assert isinstance(message, pb.HostMessage)
    return message


def test_a_pause_allows_nothing_and_ends_by_itself() -> None:
    async def scenario() -> None:
        guest = made()
        _, stream, own = await connected(guest, Epochs())
        assert pause_hinting(guest, 0.2) == 0
        assert (await next_message(stream)).policy == NOTHING
        assert guest.why_not_hinting == "paused for another 1 s"
        assert (await next_message(stream)).policy == own, "it has ended, and nobody asked for that"
        assert own.kind == ADAPTIVE
        assert guest.why_not_hinting == ""
        assert pause_hinting(guest, 0) == 0, "no pause was left"

    run(scenario())


def test_a_pause_that_is_renewed_is_told_once_and_ended_at_once() -> None:
    async def scenario() -> None:
        guest = made()
        _, stream, own = await connected(guest, Epochs())
        pause_hinting(guest, 3000)
        assert 2990 < pause_hinting(guest, 40) <= 3000, "what was left of it"
        assert guest.why_not_hinting == "paused for another 40 s", "instead of what was left"
        assert 30 < pause_hinting(guest, 0) <= 40
        assert [(await next_message(stream)).policy for _ in range(2)] == [NOTHING, own]

    run(scenario())


def test_a_pause_outlives_the_session() -> None:
    async def scenario() -> None:
        guest, epochs = made(), Epochs()
        pause_hinting(guest, 3000)  # a pause may begin before the first session
        for _ in range(2):
            session, stream, policy = await connected(guest, epochs)
            assert policy == NOTHING
            assert guest.why_not_hinting.startswith("paused for another ")
            stream.end()
            guest.sessions.leave_hinting(session)
        _, stream, _ = await connected(guest, epochs)
        pause_hinting(guest, 0)
        assert (await next_message(stream)).policy.kind == ADAPTIVE

    run(scenario())


def test_policies_are_not_told_during_a_pause() -> None:
    """An allowance during a pause is dropped; a change of patience is told when the pause ends."""

    async def scenario() -> None:
        guest, epochs = made(policy="pressure"), Epochs()
        _, stream, _ = await connected(guest, epochs)
        pause_hinting(guest, 3000)
        guest.sessions.policy.update(allowance_bytes=4 << 20)
        pause_hinting(guest, 0)
        guest.sessions.policy.update(allowance_bytes=8 << 20)
        told = [(await next_message(stream)).policy.allowance_pages for _ in range(3)]
        assert told == [0, 0, 2048], "an allowance of before the pause's end is not given late"

        patient = made()
        _, stream, _ = await connected(patient, epochs)
        pause_hinting(patient, 3000)
        patient.sessions.policy.update(patience=0.5)
        pause_hinting(patient, 0)
        told = [(await next_message(stream)).policy.break_even_ms for _ in range(2)]
        assert told == [0, 5000]

    run(scenario())


def test_what_cannot_be_paused_says_why() -> None:
    async def scenario() -> None:
        with pytest.raises(Refused, match="guest g has no hinting to pause: its method is none"):
            pause_hinting(made(host_pb2.NONE), 10)
        guest = made()
        pause_hinting(guest, MOST_PAUSE_MS / 1000)
        with pytest.raises(InvalidInput, match="3600 s is too long a pause"):
            pause_hinting(guest, MOST_PAUSE_MS / 1000 + 0.001)
        guest.lost("its process ended")
        with pytest.raises(GuestLost, match="guest g: its process ended"):
            pause_hinting(guest, 0)
        assert guest.sessions.policy.pause_left_s == 0

    run(scenario())


def test_a_pause_is_a_metric() -> None:
    async def scenario() -> None:
        registry = Registry({})
        collectors = CollectorRegistry()
        collectors.register(metrics.LedgerCollector(registry, "h1"))
        guest = registry.add("g", "u", "t", host_pb2.GuestSpec(method=host_pb2.HINTING))
        labels = {"guest": "g", "trial": "t", "host": "h1", "domain": "", "uuid": "u"}

        def paused_s() -> float:
            found = collectors.get_sample_value("hintfleet_guest_hinting_paused_seconds", labels)
            assert found is not None
            return found

        assert paused_s() == 0
        pause_hinting(guest, 3000)
        assert 2990 < paused_s() <= 3000

    run(scenario())


def test_a_guest_that_is_about_to_be_detached_is_not_told_to_hint_again() -> None:
    """Nobody would answer its batches any more: their chunks would stay isolated."""

    async def scenario() -> None:
        guest, epochs = made(), Epochs()
        session, stream, own = await connected(guest, epochs)
        policy = guest.sessions.policy
        policy.rest()
        policy.update(patience=0.5)
        policy.pause(60)
        policy.pause(0)
        stream.end()
        told = []
        while (message := await stream.next()) is not None:
            assert isinstance(message, pb.HostMessage)
            told.append(message.policy)
        assert told == [NOTHING]
        guest.sessions.leave_hinting(session)
        _, _, again = await connected(guest, epochs)
        assert again.kind == own.kind, "as after a detach that failed"

    run(scenario())
