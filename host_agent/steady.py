"""Sets up CPython so that one guest's load does not delay the acks of all others.

Both settings lower the 99th percentile of ack latency while one guest floods
(tests/bench/flood.py).
"""

from __future__ import annotations

import gc
import sys

_SWITCH_INTERVAL_S = 0.0005
# CPython 3.11's defaults are (700, 10, 10). After freeze() there is little to collect.
_GC_THRESHOLDS = (10_000, 20, 20)


def keep_latency_steady() -> None:
    """Set switch interval and garbage collection; call once, when all modules are imported."""
    # By default a thread that computes keeps the interpreter lock for 5 ms while the event
    # loop waits for it.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # A full collection walks all objects: 33 ms with little more than the modules loaded, and
    # a flood of ranges causes one every few seconds. Modules are never garbage: freeze them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
