"""The name of each metric that a host agent serves is written out in the source, so that a search
finds it."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from host_agent.api import metrics
from host_agent.registry import Registry


def test_a_name_that_is_served_stands_literally_in_the_source() -> None:
    collectors = CollectorRegistry()
    collectors.register(metrics.LedgerCollector(Registry({}), "h1"))
    served = re.findall(r"^# TYPE (\w+) ", generate_latest(collectors).decode(), re.MULTILINE)
    source = Path(metrics.__file__).read_text()
    assert "hintfleet_guest_hinted_bytes_total" in served
    assert not [name for name in served if f'"{name}"' not in source]
