"""A host agent that answers QEMU at once when a guest is stopped or reset, even while a punch runs.
This breaks I5. Its punches are slow, because a guest that boots does not use its memory again
within milliseconds."""

from host_agent.__main__ import main
from host_agent.memory.fence import Fence
from tests.torture.planted.slow_punch import slow_down

if __name__ == "__main__":
    slow_down()
    Fence.close = lambda _, when_empty: when_empty()  # type: ignore[assignment]
    main()
