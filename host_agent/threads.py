"""Between drivers and the event loop: a separate thread pool for the blocking calls of drivers, so
that they do not delay batches; and calls from drivers' threads to the loop.

A driver's call may take seconds: libvirt makes a domain, or a guest releases a DIMM. Punches,
looks at RAM files and writes of books use the event loop's default thread pool. If drivers used
that pool too, slow calls could take all of its threads. (The calls in balloon_loop.py do use the
default pool.)

Also settings of CPython with which the load of one guest delays the acks of other guests less: both
lower the 99th percentile of ack latency while one guest floods (tests/bench/flood.py).
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_SWITCH_INTERVAL_S = 0.0005
# CPython 3.11's defaults are (700, 10, 10). Little garbage is in cycles, so collections may be
# rarer.
_GC_THRESHOLDS = (10_000, 20, 20)

_drivers = ThreadPoolExecutor(max_workers=16, thread_name_prefix="driver")


async def in_driver_thread(do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a driver's blocking call in a thread of the drivers' pool, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(_drivers, partial(do, *args, **kwargs))


def call_on(loop: asyncio.AbstractEventLoop, do: Callable[[], object]) -> None:
    """Call `do` on an event loop, from any thread; do nothing if the loop is closed."""
    # A guest's process may end after the loop was closed; then call_soon_threadsafe raises.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(do)


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
