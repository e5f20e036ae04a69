"""What a sample says of resident memory is stored, and what it does not say is null, not 0."""

from pathlib import Path

import duckdb

from hintfleet.v1 import host_pb2
from orchestrator.results.store.samples import RESIDENT_PARTS, mean_parts, write_part
from orchestrator.trial.records import HostSamples, Samples, columns_of


def sample(resident_bytes: int, at_s: int = 0, **more: object) -> Samples:
    ledger = host_pb2.Ledger(resident_bytes=resident_bytes)
    one = host_pb2.Sample(guest_name="g", ledger=ledger, **more)  # type: ignore[arg-type]
    sent = HostSamples(
        host="h", samples=host_pb2.SampleSet(at_unix_us=at_s * 1_000_000, samples=[one])
    )
    return Samples(trial_id="t", columns=columns_of([sent]))


def test_a_mean_is_over_time_and_not_over_samples(tmp_path: Path) -> None:
    """At rest, samples are left out: each sample holds until the next."""
    told = {1: 50, 21: 50, 31: 400, 32: 400, 33: 400}  # used bytes by second; the last until 41
    samples = [
        sample(at_s, at_s=at_s, resident_parts=host_pb2.ResidentParts(used_bytes=used))
        for at_s, used in told.items()
    ]
    write_part(tmp_path, 1, [sample(1), *samples])
    found = mean_parts(tmp_path, 1_000_000, 41_000_000)
    assert found["used"] == (50 * 30 + 400 * 10) / 40
    assert set(found) == set(RESIDENT_PARTS)
    assert mean_parts(tmp_path, 50_000_000, 60_000_000) == {}


def test_parts_are_stored_and_null_where_nobody_told(tmp_path: Path) -> None:
    parts = host_pb2.ResidentParts(resident_bytes=9, used_bytes=10, unexplained_bytes=-1)
    part = write_part(
        tmp_path,
        1,
        [sample(7), sample(8, resident_parts=parts, process_rss_bytes=5), sample(9)],
    )
    with duckdb.connect() as database:
        stored = database.read_parquet(str(part))
        names = ("resident_bytes", "process_rss_bytes")
        of_parts = ("parts_used_bytes", "parts_unexplained_bytes", "parts_waiting_bytes")
        columns = set(stored.columns)
        found = stored.project(", ".join((*names, *of_parts))).fetchall()
    assert found == [(7, None, None, None, None), (8, 5, 10, -1, 0), (9, None, None, None, None)]
    every = {f"parts_{field.name}" for field in host_pb2.ResidentParts.DESCRIPTOR.fields}
    assert every < columns
