"""The name of each metric that a host agent serves is written out in the source, so that a search
finds it. Metrics are served again after a time in which no thread could be started."""

import asyncio
import re
import socket
import threading
from http.client import HTTPConnection
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from hintfleet.v1 import host_pb2
from host_agent.api import metrics
from host_agent.memory.ram import GuestRam
from host_agent.registry import Registry


def test_a_name_that_is_served_stands_literally_in_the_source() -> None:
    collectors = CollectorRegistry()
    collectors.register(metrics.LedgerCollector(Registry({}), "h1"))
    served = re.findall(r"^# TYPE (\w+) ", generate_latest(collectors).decode(), re.MULTILINE)
    source = Path(metrics.__file__).read_text()
    assert "hintfleet_guest_hinted_bytes_total" in served
    assert not [name for name in served if f'"{name}"' not in source]


def test_no_name_service_is_asked_before_metrics_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where none answers, the host agent would stand still for half a minute."""

    def ask(_: str) -> str:
        raise AssertionError

    monkeypatch.setattr(socket, "getfqdn", ask)
    with metrics.serve_metrics("127.0.0.1:0", Registry({}), "h1"):
        pass


def test_metrics_are_served_again_when_threads_can_be_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def status() -> int:
        connection = HTTPConnection(address, timeout=30)
        connection.request("GET", "/metrics")
        return connection.getresponse().status

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with metrics.serve_metrics(address, Registry({}), "h1"):
        assert status() == 200
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            for _ in range(20):  # more than connections that may be open
                with pytest.raises(OSError, match=r"closed|reset"):
                    status()
        assert status() == 200


def test_a_guest_without_memory_has_totals_and_no_gauges(ram: GuestRam) -> None:
    """A sum over all guests must not count the savings of domains that do not run."""
    registry = Registry({})
    guest = registry.add("g", "u", "", host_pb2.GuestSpec(method=host_pb2.HINTING))
    guest.memory.started(ram)
    asyncio.run(guest.audits.ledger())
    guest.memory.closed()
    collectors = CollectorRegistry()
    collectors.register(metrics.LedgerCollector(registry, "h1"))
    served = generate_latest(collectors).decode().splitlines()
    assert any(line.startswith("hintfleet_guest_hinted_bytes_total{") for line in served)
    assert not [line for line in served if line.startswith("hintfleet_guest_resident_bytes{")]
