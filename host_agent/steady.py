"""Sets up CPython so that the load of one guest delays the acks of other guests less.

`keep_latency_steady` sets the threads' switch interval and the garbage collector. Both settings
lower the 99th percentile of ack latency while one guest floods (tests/bench/flood.py).
"""

from __future__ import annotations

import gc
import sys

_SWITCH_INTERVAL_S = 0.0005
# CPython 3.11's defaults are (700, 10, 10). Little garbage is in cycles, so collections may be
# rarer.
_GC_THRESHOLDS = (10_000, 20, 20)


def keep_latency_steady() -> None:
    """Set switch interval and garbage collection; call once, after all modules are imported."""
    # By default a thread that computes keeps the interpreter lock for 5 ms, even if the event
    # loop waits for the lock.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # A full collection walks all objects. That takes 33 ms even if there is little more than the
    # modules, and a flood of ranges causes a collection every few seconds. Modules are never
    # garbage, so freeze them: collections skip frozen objects.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
