"""Keeps our handler of SIGTERM while Ray starts; ignores Ctrl-C and SIGTERM during cleanup."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """When the block ends, restore the handler of SIGTERM; outside the main thread, do nothing."""
    # ray.init replaces our handler by one that calls sys.exit (`init` in
    # ray/_private/worker.py, 2.60). With our handler, SIGTERM ends a run like Ctrl-C.
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # Python allows signal.signal() in the main thread only. In another thread, Ray has not
        # replaced the handler.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM in the block, so that cleanup is not cut short.

    Outside the main thread, the block runs and signals are not ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
