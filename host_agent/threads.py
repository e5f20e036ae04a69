"""Between drivers and the event loop: a separate thread pool for the blocking calls of drivers, so
that they do not delay batches; and calls from drivers' threads to the loop.

A driver's call may take seconds: libvirt makes a domain, or a guest releases a DIMM. Punches,
looks at RAM files and writes of books use the event loop's default thread pool. If drivers used
that pool too, slow calls could take all of its threads. (The calls in balloon_loop.py do use the
default pool.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_drivers = ThreadPoolExecutor(max_workers=16, thread_name_prefix="driver")


async def in_driver_thread(do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a driver's blocking call in a thread of the drivers' pool, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(_drivers, partial(do, *args, **kwargs))


def call_on(loop: asyncio.AbstractEventLoop, do: Callable[[], object]) -> None:
    """Call `do` on an event loop, from any thread; do nothing if the loop is closed."""
    # A guest's process may end after the loop was closed; then call_soon_threadsafe raises.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(do)
