"""Converts runs and savings into the fleet service's messages, and savings back."""

from __future__ import annotations

from hintfleet.v1 import fleet_pb2
from orchestrator.results.footprint import Footprint, Returned
from orchestrator.results.savings import By, Savings
from orchestrator.results.statistics import Interval
from orchestrator.results.store.reader import Run

BY_PB2 = {
    By.FLEET: fleet_pb2.QuerySavingsRequest.FLEET,
    By.HOST: fleet_pb2.QuerySavingsRequest.HOST,
    By.GUEST: fleet_pb2.QuerySavingsRequest.GUEST,
    By.ARM: fleet_pb2.QuerySavingsRequest.ARM,
}


def run_as_pb2(run: Run) -> fleet_pb2.Run:
    """Convert a run into its message; times become whole seconds."""
    return fleet_pb2.Run(
        run_id=run.run_id,
        name=run.name,
        driver=run.driver,
        started_unix_s=run.started_unix_us // 1_000_000,
        ended_unix_s=run.ended_unix_us // 1_000_000,
        state=run.state,
        reason=run.reason,
    )


def savings_as_pb2(row: Savings) -> fleet_pb2.Savings:
    """Convert a row of savings into its message; bytes of the footprint and of the control become
    whole numbers."""
    return fleet_pb2.Savings(
        experiment=row.experiment,
        spec_hash=row.spec_hash,
        run_id=row.run_id,
        arm=row.arm,
        key=row.key,
        trials=row.trials,
        footprint=_footprint_as_pb2(row.footprint) if row.footprint else None,
        saved_bytes=_interval_as_pb2(row.saved_bytes),
        saved_gib_min=_interval_as_pb2(row.saved_gib_min),
        control_bytes=None if row.control_bytes is None else round(row.control_bytes),
        undecided=row.undecided,
        left_out_pairs=row.left_out_pairs,
        pairs=row.pairs,
    )


def savings_from_pb2(message: fleet_pb2.Savings) -> Savings:
    """Convert a message back into a row of savings."""
    # Checked with HasField: for a sub-message that is not set, proto3 returns one full of zeros,
    # not None.
    return Savings(
        experiment=message.experiment,
        spec_hash=message.spec_hash,
        run_id=message.run_id,
        arm=message.arm,
        key=message.key,
        trials=message.trials,
        footprint=(
            _footprint_from_pb2(message.footprint) if message.HasField("footprint") else None
        ),
        saved_bytes=(
            _interval_from_pb2(message.saved_bytes) if message.HasField("saved_bytes") else None
        ),
        saved_gib_min=(
            _interval_from_pb2(message.saved_gib_min) if message.HasField("saved_gib_min") else None
        ),
        control_bytes=message.control_bytes if message.HasField("control_bytes") else None,
        undecided=message.undecided,
        left_out_pairs=message.left_out_pairs,
        pairs=message.pairs,
    )


def _footprint_as_pb2(footprint: Footprint) -> fleet_pb2.Footprint:
    message = fleet_pb2.Footprint(
        provisioned_bytes=footprint.provisioned_bytes,
        peak_resident_bytes=round(footprint.peak_resident_bytes),
        mean_resident_bytes=round(footprint.mean_resident_bytes),
        resident_gib_min=footprint.resident_gib_min,
        reclaimed_now_bytes=footprint.reclaimed_now_bytes,
        refaulted_total_bytes=footprint.refaulted_total_bytes,
        verified_pages=footprint.verified_pages,
        wrong_pages=footprint.wrong_pages,
        coincidence=footprint.coincidence,
    )
    if footprint.returned is not None:
        returned = footprint.returned
        message.returned.freed_bytes = returned.freed_bytes
        message.returned.left_bytes = round(returned.left_bytes)
        message.returned.after_s = returned.after_s
    return message


def _footprint_from_pb2(message: fleet_pb2.Footprint) -> Footprint:
    return Footprint(
        provisioned_bytes=message.provisioned_bytes,
        peak_resident_bytes=message.peak_resident_bytes,
        mean_resident_bytes=message.mean_resident_bytes,
        resident_gib_min=message.resident_gib_min,
        reclaimed_now_bytes=message.reclaimed_now_bytes,
        refaulted_total_bytes=message.refaulted_total_bytes,
        verified_pages=message.verified_pages,
        wrong_pages=message.wrong_pages,
        returned=_returned_from_pb2(message.returned) if message.HasField("returned") else None,
        coincidence=message.coincidence if message.HasField("coincidence") else None,
    )


def _returned_from_pb2(message: fleet_pb2.Returned) -> Returned:
    return Returned(
        freed_bytes=message.freed_bytes,
        left_bytes=message.left_bytes,
        after_s=message.after_s,
    )


def _interval_as_pb2(interval: Interval | None) -> fleet_pb2.Interval | None:
    if interval is None:
        return None
    return fleet_pb2.Interval(
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        pairs=interval.pairs,
        first_look=interval.first_look,
    )


def _interval_from_pb2(message: fleet_pb2.Interval) -> Interval:
    return Interval(
        mean=message.mean,
        low=message.low,
        high=message.high,
        pairs=message.pairs,
        first_look=message.first_look,
    )
