"""The guests' books, and more of their state, as Prometheus metrics over HTTP(S).

A scrape reads the books that were computed last for each guest (`last_ledger`). It does not look at
RAM files, so no batch has to wait for it.
"""

from __future__ import annotations

import socket
import socketserver
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from threading import BoundedSemaphore, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hintfleet.errors import InvalidInput, Refused
from hintfleet.net.addresses import address_problem, check_plain_text, is_unix
from hintfleet.net.tls import Peer, Role, Tls
from host_agent.api.sampling import parts_of, process_rss_bytes
from host_agent.guest import Guest, has_memory
from host_agent.registry import Registry

# Fields of the ledger, by the names of their metrics. The names are written out, so that grep
# finds them.
_GAUGES = {
    "hintfleet_guest_provisioned_bytes": (
        "provisioned_bytes",
        "Memory that the guest has, with what was plugged",
    ),
    "hintfleet_guest_resident_bytes": ("resident_bytes", "Blocks of the guest's RAM file"),
    "hintfleet_guest_reclaimed_now_bytes": (
        "reclaimed_now_bytes",
        "Reclaimed and still absent: ledger savings",
    ),
    "hintfleet_guest_untouched_bytes": ("untouched_bytes", "Never resident"),
}
_COUNTERS = {
    "hintfleet_guest_hinted_bytes_total": ("hinted_total_bytes", "Hinted by the guest"),
    "hintfleet_guest_reclaimed_bytes_total": (
        "reclaimed_total_bytes",
        "Resident before a punch, absent after",
    ),
    "hintfleet_guest_absent_bytes_total": (
        "absent_total_bytes",
        "Hinted, but absent already",
    ),
    "hintfleet_guest_refaulted_bytes_total": (
        "refaulted_total_bytes",
        "Reclaimed, then used again by the guest",
    ),
    "hintfleet_guest_unplugged_bytes_total": (
        "unplugged_total_bytes",
        "Reclaimed, and still absent when it was unplugged",
    ),
    "hintfleet_guest_batches_total": ("batches", "Batches received"),
}

# Values of the label `part`, and their fields of ResidentParts. `unexplained` may be negative.
_PARTS = {
    "used": "used_bytes",
    "file_cache": "file_cache_bytes",
    "held_back": "held_back_bytes",
    "free_pieces": "free_pieces_bytes",
    "in_flight": "in_flight_bytes",
    "waiting": "waiting_bytes",
    "unexplained": "unexplained_bytes",
}

# The most connections at a time: each takes a thread, and everybody who can reach the port can
# open one.
_MAX_CONNECTIONS = 16


_LABELS = ("guest", "trial", "host", "domain", "uuid")


class LedgerCollector(Collector):
    """Turns the ledgers and other figures of all guests into metric families."""

    def __init__(self, registry: Registry, host: str) -> None:
        """:param host: the name of this host, which is a label."""
        self._registry = registry
        self._host = host

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families, each with the labels `_LABELS`: fields of the ledger, memory
        that is held back, parts of the resident memory and their age, memory of the guest's
        process, pauses, violations, bans, and skipped bytes by reason."""
        guests = [(self._labels(g), g) for g in self._registry.guests]
        families = [(GaugeMetricFamily, *one) for one in _GAUGES.items()] + [
            (CounterMetricFamily, *one) for one in _COUNTERS.items()
        ]
        running = [one for one in guests if has_memory(one[1])]
        for make, name, (field, text) in families:
            family = make(name, text, labels=_LABELS)
            for labels, guest in running if make is GaugeMetricFamily else guests:
                family.add_metric(labels, getattr(guest.memory.last_ledger, field))
            yield family
        held_back = GaugeMetricFamily(
            "hintfleet_guest_held_back_bytes",
            "Free memory that the guest holds back, to use it again soon",
            labels=_LABELS,
        )
        for labels, guest in running:
            held_back.add_metric(labels, guest.sessions.telemetry.held_back_bytes)
        yield held_back
        yield from self._resident_parts(running)
        paused = GaugeMetricFamily(
            "hintfleet_guest_hinting_paused_seconds",
            "How long the pause of the guest's hinting will last; 0 without one",
            labels=_LABELS,
        )
        for labels, guest in guests:
            paused.add_metric(labels, guest.sessions.policy.pause_left_s)
        yield paused
        yield from self._conduct(guests)
        skipped = CounterMetricFamily(
            "hintfleet_guest_skipped_bytes_total",
            "Not touched, by reason",
            labels=(*_LABELS, "reason"),
        )
        for labels, guest in guests:
            for reason, size_bytes in guest.memory.last_ledger.skipped_total_bytes.items():
                skipped.add_metric((*labels, reason), size_bytes)
        yield skipped

    def _resident_parts(self, guests: Sequence[tuple[tuple[str, ...], Guest]]) -> Iterator[Metric]:
        parts = GaugeMetricFamily(
            "hintfleet_guest_resident_part_bytes",
            "What hintfleet_guest_resident_bytes consisted of when the guest last said so",
            labels=(*_LABELS, "part"),
        )
        age = GaugeMetricFamily(
            "hintfleet_guest_resident_part_age_seconds",
            "How long ago that was",
            labels=_LABELS,
        )
        process = GaugeMetricFamily(
            "hintfleet_guest_process_rss_bytes",
            "Memory of the guest's process that is not the guest's RAM",
            labels=_LABELS,
        )
        for labels, guest in guests:
            found = parts_of(guest)
            if found is not None:
                for part, field in _PARTS.items():
                    parts.add_metric((*labels, part), getattr(found, field))
                age.add_metric(labels, found.age_ms / 1000)
            if (process_bytes := process_rss_bytes(guest)) is not None:
                process.add_metric(labels, process_bytes)
        yield from (parts, age, process)

    def _labels(self, guest: Guest) -> tuple[str, ...]:
        return guest.name, guest.trial_id, self._host, guest.domain, guest.uuid

    def _conduct(self, guests: Sequence[tuple[tuple[str, ...], Guest]]) -> Iterator[Metric]:
        now_s = time.monotonic()
        violations = CounterMetricFamily(
            "hintfleet_guest_violations_total", "Broken rules of the protocol", labels=_LABELS
        )
        banned = GaugeMetricFamily(
            "hintfleet_guest_barred", "1 while the guest is banned", labels=_LABELS
        )
        for labels, guest in guests:
            violations.add_metric(labels, guest.sessions.conduct.violations)
            banned.add_metric(labels, guest.sessions.conduct.is_banned(now_s))
        yield from (violations, banned)


@contextmanager
def serve_metrics(
    address: str, registry: Registry, host: str, tls: Tls | None = None
) -> Iterator[None]:
    """Serve metrics over HTTP(S) while the block runs; an empty address serves none.

    :raises InvalidInput: the address is not HOST:PORT, or needs TLS.
    :raises Refused: it cannot be bound.
    """
    if not address:
        yield
        return
    if is_unix(address) or address_problem(address):
        raise InvalidInput(f"--metrics {address!r} is not HOST:PORT", hint="127.0.0.1:9177")
    if tls is None:
        check_plain_text(address)
    collectors = CollectorRegistry()
    collectors.register(LedgerCollector(registry, host))
    try:
        server = _make_server(address, tls)
    except OSError as error:
        raise Refused(f"cannot serve metrics on {address}: {error.strerror}") from error
    server.set_app(make_wsgi_app(collectors))
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _make_server(address: str, tls: Tls | None) -> _Server:
    host, _, port = address.rpartition(":")
    kind = _Server6 if host.startswith("[") else _Server
    server = kind((host.strip("[]"), int(port)), _Handler)
    if tls is not None:
        # No handshake on connect: `accept` would do it in the only thread that accepts, where one
        # client that stalls would stall all. The first read does it, in the connection's thread.
        server.socket = tls.server_context().wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    return server


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    _free_slots = BoundedSemaphore(_MAX_CONNECTIONS)

    def server_bind(self) -> None:
        """Bind, without asking the name service for this machine's name, as http.server does: that
        may take half a minute, in which the host agent would stand still."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve the connection in a thread of its own; close it if too many are open."""
        if not self._free_slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started now
            self._free_slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve the connection, then free its slot."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore an error of a connection: most often its client hung up, stalled or showed no
        certificate."""
        # The method of socketserver would print a traceback.


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10.0

    def parse_request(self) -> bool:
        """Read the request; return whether to serve it. Under TLS, refuse it without an operator's
        certificate."""
        if not super().parse_request():
            return False
        if isinstance(self.connection, ssl.SSLSocket):
            names: Any = (self.connection.getpeercert() or {}).get("subjectAltName", ())
            peer = Peer.of_uris(value for kind, value in names if kind == "URI")
            if peer is None or peer.role is not Role.OPERATOR:
                self.send_error(HTTPStatus.FORBIDDEN, "metrics need an operator's certificate")
                return False
        return True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Log nothing: http.server would write a line to stderr for each scrape."""
