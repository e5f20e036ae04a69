"""What the host says in a hinting session, made of what it decided."""

from __future__ import annotations

from collections.abc import Mapping

from hintfleet.ranges import encode
from hintfleet.units import PAGE_BYTES
from hintfleet.v1 import hinting_pb2 as pb
from hintfleet.v1 import host_pb2
from host_agent.memory.reclaim import Outcome
from host_agent.session.gate import LIMITS, Batch

_DEFAULT_PERIOD_MS = 200
_DEFAULT_COLD_AFTER_MS = 5000

POLICIES: Mapping[str, pb.Policy.Kind.ValueType] = {
    "": pb.Policy.EAGER,
    "eager": pb.Policy.EAGER,
    "cold": pb.Policy.COLD,
    "pressure": pb.Policy.PRESSURE,
}


def policy_of(settings: host_pb2.HintingSettings, allowance_bytes: int = 0) -> pb.Policy:
    """What a guest with these settings is told."""
    return pb.Policy(
        kind=POLICIES[settings.policy],
        report_period_ms=settings.report_period_ms or _DEFAULT_PERIOD_MS,
        cold_after_ms=settings.cold_after_ms or _DEFAULT_COLD_AFTER_MS,
        allowance_pages=allowance_bytes // PAGE_BYTES,
    )


def welcome_of(epoch: int, settings: host_pb2.HintingSettings) -> pb.HostMessage:
    """The first message of a session."""
    return pb.HostMessage(
        welcome=pb.Welcome(epoch=epoch, policy=policy_of(settings), limits=LIMITS)
    )


def ack_of(batch: Batch, outcome: Outcome) -> pb.HostMessage:
    """What became of a batch, for the guest."""
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
