"""Keeps punches out while a guest's RAM must not be punched.

A batch gets a permit when its turn comes. With this permit it enters the fence again and again, for
one slice of its punches each time. So whoever closes the fence has to wait for one slice, not for
the whole batch. Closing the fence also ends all permits: when the fence is opened again, another
epoch begins, and the rest of an old batch must not run in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class FenceClosed(Exception):
    """A slice must not begin: the fence is closed, or was closed after its permit was given."""


class Fence:
    """A fence is open or closed; a new fence is open. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._is_open = True
        self._closed_times = 0
        self._inside = 0
        self._when_empty: Callable[[], object] = _nothing

    def permit(self) -> int:
        """Return a permit for `slice`. The permit ends with the next `close`."""
        return self._closed_times

    @contextmanager
    def slice(self, permit: int) -> Iterator[None]:
        """Be inside the fence until the block ends.

        :raises FenceClosed: the fence is closed, or was closed after the permit was given.
        """
        with self._lock:
            if not self._is_open or permit != self._closed_times:
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
        """Let no slice begin until `open`, and end all permits.

        :param when_empty: called when no slice is inside: at once, from this thread, if that is so
            now, else from the thread of the last slice. A `close` or `open` before then cancels
            the call.
        """
        with self._lock:
            self._is_open = False
            self._closed_times += 1
            self._when_empty = when_empty
            is_empty = not self._inside
        if is_empty:
            when_empty()

    def open(self) -> None:
        """Let slices begin, with permits that were given after the last `close`."""
        with self._lock:
            self._is_open = True
            self._when_empty = _nothing


def _nothing() -> None:
    pass
