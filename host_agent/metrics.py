"""The books as Prometheus metrics.

Read at scrape time from the last audit of each guest; a scrape audits nothing
itself, so it cannot slow a guest's batches down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hintfleet.errors import InvalidInput, Refused
from host_agent.registry import Registry

_GAUGES = {
    "provisioned_bytes": "What the guest was promised",
    "resident_bytes": "Blocks of the guest's RAM file",
    "reclaimed_now_bytes": "Reclaimed and still absent: ledger savings",
    "untouched_bytes": "Never resident",
}
_COUNTERS = {
    "hinted_total_bytes": "Hinted by the guest",
    "reclaimed_total_bytes": "Resident before a punch, absent after",
    "absent_total_bytes": "Hinted, but nothing was there",
    "refaulted_total_bytes": "Reclaimed, then used again by the guest",
    "batches": "Batches received",
}


class LedgerCollector(Collector):
    """Turns the ledgers of all guests into metric families."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """One family per field of the ledger, labelled by guest and trial."""
        books = [(g.name, g.trial_id, g.last_ledger) for g in self._registry.guests]
        families = [(GaugeMetricFamily, field, field, text) for field, text in _GAUGES.items()] + [
            # Prometheus puts _total behind a counter's name and its unit before that.
            (CounterMetricFamily, field, field.replace("_total", ""), text)
            for field, text in _COUNTERS.items()
        ]
        for make, field, name, text in families:
            family = make(f"hintfleet_guest_{name}", text, labels=("guest", "trial"))
            for guest, trial, ledger in books:
                family.add_metric((guest, trial), getattr(ledger, field))
            yield family
        skipped = CounterMetricFamily(
            "hintfleet_guest_skipped_bytes",
            "Not touched, by reason",
            labels=("guest", "trial", "reason"),
        )
        for guest, trial, ledger in books:
            for reason, size_bytes in ledger.skipped_total_bytes.items():
                skipped.add_metric((guest, trial, reason), size_bytes)
        yield skipped


@contextmanager
def serve_metrics(address: str, registry: Registry) -> Iterator[None]:
    """Serve metrics over HTTP while the block runs; an empty address serves none.

    :raises InvalidInput: the address is not HOST:PORT.
    :raises Refused: it cannot be bound.
    """
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidInput(f"--metrics {address!r} is not HOST:PORT", hint="127.0.0.1:9177")
    collectors = CollectorRegistry()
    collectors.register(LedgerCollector(registry))
    try:
        server, thread = start_http_server(int(port), addr=host, registry=collectors)
    except OSError as error:
        raise Refused(f"cannot serve metrics on {address}: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
