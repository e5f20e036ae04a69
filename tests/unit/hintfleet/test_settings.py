"""The defaults that host.proto documents are those of the code."""

import re
from pathlib import Path

from hintfleet import settings

HOST_PROTO = Path(settings.__file__).parent / "v1/host.proto"


def test_the_contract_says_the_defaults() -> None:
    found = re.findall(r"0 means ([^;.]+)[;.].*?uint32 (\w+) =", HOST_PROTO.read_text(), re.DOTALL)
    assert {name: default for default, name in found} == {
        "node_count": "1",
        "reserve_percent": f"{settings.DEFAULT_RESERVE_PERCENT}",
        "step_percent": f"{settings.DEFAULT_STEP_PERCENT}",
        "chunk_order": f"{settings.DEFAULT_CHUNK_ORDER}",
        "report_period_ms": f"{settings.DEFAULT_REPORT_PERIOD_MS} ms",
        "threshold_chunks": f"{settings.DEFAULT_THRESHOLD_CHUNKS}",
        "cold_after_ms": f"{settings.DEFAULT_COLD_AFTER_MS // 1000} s",
        "break_even_ms": f"{settings.DEFAULT_BREAK_EVEN_MS // 1000} s",
        "pressure_percent": f"{settings.DEFAULT_PRESSURE_PERCENT}",
    }
