"""Where blocking calls run, so that the slow ones hold up nobody else's batch.

A driver's call may take long: libvirt makes a domain in seconds, and a guest may think for as
long about a DIMM. Punches, looks at RAM files and saved books have the event loop's own
threads to themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_drivers = ThreadPoolExecutor(max_workers=16, thread_name_prefix="driver")


async def in_driver_thread(do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Like `asyncio.to_thread`, for what a driver or its guests do."""
    return await asyncio.get_running_loop().run_in_executor(_drivers, partial(do, *args, **kwargs))
