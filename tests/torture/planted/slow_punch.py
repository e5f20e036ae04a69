"""A host agent whose punches take long: so long that a guest that is reset while one runs boots and
uses its memory again before that punch is done.

This is not a bug by itself: QEMU waits for the slice that has begun before it resets the guest, and
the memory door's fence lets no other slice of that batch begin.
"""

import threading
import time
from collections.abc import Callable

from host_agent.__main__ import main
from host_agent.memory import ram
from host_agent.memory.fence import Fence

SLICE_S = 2.0
"""How long each slice takes: so that some resets come while one runs."""
RESET_S = 180.0
"""How long a slice goes on after the guest was stopped: it boots, and its workload fills its
memory."""


def slow_down() -> None:
    """Delay each slice after it has begun, and before it drops memory."""
    stopped = threading.Condition()
    times = 0
    close, punch = Fence.close, vars(ram)["punch"]

    def noticed(fence: Fence, when_empty: Callable[[], object]) -> None:
        nonlocal times
        with stopped:
            times += 1
            stopped.notify_all()
        close(fence, when_empty)

    def delayed(*arguments: object) -> object:
        with stopped:
            before = times
            was_stopped = stopped.wait_for(lambda: times > before, SLICE_S)
        if was_stopped:
            time.sleep(RESET_S)
        return punch(*arguments)

    Fence.close = noticed  # type: ignore[assignment,method-assign]
    vars(ram)["punch"] = delayed


if __name__ == "__main__":
    slow_down()
    main()
