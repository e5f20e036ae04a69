"""Builds messages that the host sends in a hinting session: Policy, Welcome and Ack."""

from __future__ import annotations

from collections.abc import Mapping

from hintfleet.errors import Refused
from hintfleet.ranges import encode
from hintfleet.settings import (
    DEFAULT_BREAK_EVEN_MS,
    DEFAULT_COLD_AFTER_MS,
    DEFAULT_POLICY,
    DEFAULT_REPORT_PERIOD_MS,
    Policy,
)
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.memory.reclaim import Outcome
from host_agent.session.gate import LIMITS, Batch

_KINDS: Mapping[Policy, pb.Policy.Kind.ValueType] = {
    Policy.ADAPTIVE: pb.Policy.ADAPTIVE,
    Policy.EAGER: pb.Policy.EAGER,
    Policy.COLD: pb.Policy.COLD,
    Policy.PRESSURE: pb.Policy.PRESSURE,
}


def policy_of(
    settings: host_pb2.HintingSettings, *, allowance_bytes: int = 0, patience: float = 1.0
) -> pb.Policy:
    """Return the message Policy for a guest with these settings; a setting that is 0 or empty means
    its default.

    :param patience: policy adaptive: see `host_agent.pressure.policy.patience`.
    :raises Refused: there is no such policy.
    """
    asked = settings.policy or DEFAULT_POLICY
    if asked not in tuple(Policy):
        raise Refused(
            f"hinting has no policy {asked!r}", hint=f"policy: {' or '.join(tuple(Policy))}"
        )
    return pb.Policy(
        kind=_KINDS[Policy(asked)],
        report_period_ms=settings.report_period_ms or DEFAULT_REPORT_PERIOD_MS,
        cold_after_ms=settings.cold_after_ms or DEFAULT_COLD_AFTER_MS,
        allowance_pages=allowance_bytes // PAGE_BYTES,
        break_even_ms=round(patience * (settings.break_even_ms or DEFAULT_BREAK_EVEN_MS)),
    )


def nothing_allowed(policy: pb.Policy) -> pb.Policy:
    """Return a policy under which a guest hints nothing, with the report period of `policy`."""
    # Not a message of its own: agents of every version obey an allowance of 0.
    return pb.Policy(kind=pb.Policy.PRESSURE, report_period_ms=policy.report_period_ms)


def welcome_of(epoch: int, policy: pb.Policy) -> pb.HostMessage:
    """Return the Welcome, the host's first message in a session."""
    return pb.HostMessage(welcome=pb.Welcome(epoch=epoch, policy=policy, limits=LIMITS))


def ack_of(batch: Batch, outcome: Outcome) -> pb.HostMessage:
    """Return the message that tells the guest the outcome of a batch."""
    return pb.HostMessage(
        ack=pb.Ack(
            epoch=batch.epoch,
            seq=batch.seq,
            reclaimed_bytes=outcome.reclaimed.page_count * PAGE_BYTES,
            absent_bytes=outcome.absent.page_count * PAGE_BYTES,
            skipped=[
                pb.Skipped(reason=reason, ranges=encode(ranges))
                for reason, ranges in outcome.skipped.items()
            ],
        )
    )
