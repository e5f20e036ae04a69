"""Keeps punches out while a guest may not be punched, and makes nobody wait for long.

A batch gets a permit when its turn comes. With this permit it enters the fence again and again, for
one slice of its punches each time. Whoever closes the fence waits for the slice that is inside, not
for the whole batch. Closing the fence also ends all permits: after it is opened again, another
epoch has begun, in which the rest of an old batch must not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class FenceClosed(Exception):
    """No slice with this permit may begin any more."""


class Fence:
    """A fence is open or closed; a new fence is open. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._is_open = True
        self._closed_times = 0
        self._inside = 0
        self._when_empty: Callable[[], object] = _nothing

    def permit(self) -> int:
        """Return a permit for `slice`, which holds until the fence is closed the next time."""
        return self._closed_times

    @contextmanager
    def slice(self, permit: int) -> Iterator[None]:
        """Be inside the fence until the block ends.

        :raises FenceClosed: it is closed, or was since the permit was given.
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
        """Let no slice begin any more.

        :param when_empty: called once none is inside: at once, from this thread, or later, from
            the thread of the last one.
        """
        with self._lock:
            self._is_open = False
            self._closed_times += 1
            self._when_empty = when_empty
            is_empty = not self._inside
        if is_empty:
            when_empty()

    def open(self) -> None:
        """Let slices begin, with permits that are given from now on."""
        with self._lock:
            self._is_open = True
            self._when_empty = _nothing


def _nothing() -> None:
    pass
