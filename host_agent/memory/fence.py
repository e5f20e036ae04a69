"""Keeps punches out while a guest's RAM must not be punched.

A batch gets a permit when its turn comes. With this permit it enters the fence, and before each of
its punches the permit is checked again (punch.py). Closing the fence ends all permits, so whoever
closes it has to wait for one punch, not for the whole batch. A permit stays ended when the fence is
opened again: then another epoch begins, and the rest of an old batch must not run in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int64
from threading import Lock


class FenceClosed(Exception):
    """A punch must not begin: the fence is closed, or was closed after the permit was given."""


class Fence:
    """A fence is open or closed; a new fence is open. Methods may be called from any thread.

    :ivar closed_times: how often the fence was closed. Who is inside the fence begins no punch once
        this differs from the permit. A C integer, because the loop in C reads it between punches,
        while it does not hold the GIL.
    """

    def __init__(self) -> None:
        self.closed_times = c_int64(0)
        self._lock = Lock()
        self._is_open = True
        self._inside = 0
        self._when_empty: Callable[[], object] = _nothing

    def permit(self) -> int:
        """Return a permit for `inside`: `closed_times` of now. It ends with the next `close`."""
        return self.closed_times.value

    @contextmanager
    def inside(self, permit: int) -> Iterator[None]:
        """Be inside the fence until the block ends.

        :raises FenceClosed: the fence is closed, or was closed after the permit was given.
        """
        with self._lock:
            if not self._is_open or permit != self.closed_times.value:
                raise FenceClosed
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                is_last = not self._inside and not self._is_open
                call = self._when_empty if is_last else _nothing
            call()

    def close(self, when_empty: Callable[[], object]) -> None:
        """Let nobody in until `open`, and end all permits.

        :param when_empty: called when nobody is inside: at once, from this thread, if that is so
            now, else from the thread that leaves last. A `close` or `open` before then cancels
            the call.
        """
        with self._lock:
            self._is_open = False
            self.closed_times.value += 1
            self._when_empty = when_empty
            is_empty = not self._inside
        if is_empty:
            when_empty()

    def open(self) -> None:
        """Let in who has a permit that was given after the last `close`."""
        with self._lock:
            self._is_open = True
            self._when_empty = _nothing


def _nothing() -> None:
    pass
