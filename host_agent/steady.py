"""CPython, set up so that what one guest causes does not hold up all others.

Both show in the 99th percentile of ack latency while one guest floods (tests/bench/flood.py).
"""

from __future__ import annotations

import gc
import sys

_SWITCH_INTERVAL_S = 0.0005
_GC_THRESHOLDS = (10_000, 20, 20)


def keep_latency_steady() -> None:
    """Call once, when all modules are imported."""
    # Else a worker thread that computes holds up the event loop for 5 ms at a time.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # A full collection walks all objects, which takes 33 ms when hardly more than modules is
    # there, and a flood of ranges brings one every few seconds. Modules stay anyway.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
