"""A host agent that answers QEMU at once when a guest is stopped or reset, even while a punch runs.
This breaks I5. Its punches are slow, so that they still run when the guest has booted and uses its
memory again: fast punches would end before that, and do no harm."""

from host_agent.__main__ import main
from host_agent.memory.fence import Fence
from tests.torture.planted.slow_punch import slow_down

if __name__ == "__main__":
    Fence.close = lambda _, when_empty: when_empty()  # type: ignore[assignment]
    slow_down()
    main()
