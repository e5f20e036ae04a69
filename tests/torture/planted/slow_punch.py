"""A host agent whose punches take very long, so that a guest can be reset and boot meanwhile.

This is not a bug by itself: QEMU waits for the slice that has begun before it resets the guest, and
the memory door's fence lets no other slice of that batch begin.
"""

import time

from host_agent.__main__ import main
from host_agent.memory import ram

SLICE_S = 60.0
"""How long each slice takes. Batches of a real guest have several, so that the last one comes when
the guest has been reset and uses its memory again, which takes a minute or more."""


def slow_down() -> None:
    """Delay each slice after it has begun, and before it drops memory."""
    punch = vars(ram)["punch"]

    def delayed(*arguments: object) -> object:
        time.sleep(SLICE_S)
        return punch(*arguments)

    vars(ram)["punch"] = delayed


if __name__ == "__main__":
    slow_down()
    main()
