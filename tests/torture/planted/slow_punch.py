"""A host agent whose punches are slow: 2 s for each 8 of them, and 3 minutes more if a guest is
stopped meanwhile. If QEMU did not wait, a guest that is reset would boot and use its memory again
before they are done.

This is not a bug by itself: QEMU waits for the punch that has begun before it resets the guest, and
the memory door's fence lets no other punch of that batch begin.
"""

import threading
import time
from array import array
from collections.abc import Callable
from ctypes import c_int64

from host_agent.__main__ import main
from host_agent.memory import ram
from host_agent.memory.fence import Fence, FenceClosed

TOGETHER = 8
"""How many punches are delayed together."""
DELAY_S = 2.0
"""How long such punches are delayed: so that some resets come while they run."""
RESET_S = 180.0
"""How much longer, if a guest is stopped meanwhile: it boots, and its workload fills its memory."""


def slow_down() -> None:
    """Delay punches after they have begun, and before they drop memory."""
    stopped = threading.Condition()
    times = 0
    close, punch = Fence.close, vars(ram)["punch"]

    def noticed(fence: Fence, when_empty: Callable[[], object]) -> None:
        nonlocal times
        with stopped:
            times += 1
            stopped.notify_all()
        close(fence, when_empty)

    def delay() -> None:
        with stopped:
            before = times
            was_stopped = stopped.wait_for(lambda: times > before, DELAY_S)
        if was_stopped:
            time.sleep(RESET_S)

    def delayed(
        fd: int, offsets: array[int], lengths: array[int], closed_times: c_int64, permit: int
    ) -> None:
        for at in range(0, len(offsets), TOGETHER):
            if closed_times.value != permit:
                raise FenceClosed
            delay()
            some = slice(at, at + TOGETHER)
            # They have begun: what became of the permit since does not matter.
            punch(fd, offsets[some], lengths[some], c_int64(permit), permit)

    Fence.close = noticed  # type: ignore[assignment,method-assign]
    vars(ram)["punch"] = delayed


if __name__ == "__main__":
    slow_down()
    main()
