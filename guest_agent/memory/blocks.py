"""Onlines and offlines hot-plugged memory of a real guest: the memory blocks of its kernel.

Source: Documentation/admin-guide/mm/memory-hotplug.rst. A block that is offline is onlined into
ZONE_MOVABLE, where the kernel keeps only memory that it can move: so the block can be unplugged
again. A block that is online already, by the kernel's own policy (memhp_default_state), is left as
it is, which is not an error. Blocks are offlined only if the guest has enough other memory.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from guest_agent.procfs import mem_available_bytes
from hintfleet.errors import Refused
from hintfleet.ranges import RangeSet
from hintfleet.units import MIB, PAGE_BYTES, format_size

_TIMEOUT_S = 30.0
_FREE_MEMORY_TIMEOUT_S = 3.0
"""Longer than a chunk stays isolated while the host answers."""
_POLL_S = 0.1
_GONE = "gone"
_SPARE_BYTES = 32 * MIB
"""Memory that the guest must keep available, besides its watermarks."""


class MemoryBlocks:
    """Onlines and offlines whole blocks; needs root."""

    def __init__(
        self,
        root: Path = Path("/sys/devices/system/memory"),
        timeout_s: float = _TIMEOUT_S,
        available_bytes: Callable[[], int] = mem_available_bytes,
    ) -> None:
        """Prepare; nothing is read yet.

        :param timeout_s: how long a call may take to change the blocks, and as long again to set
            them back if that fails.
        :param available_bytes: return the memory that the guest can still use.
        """
        self._root = root
        self._timeout_s = timeout_s
        self._available_bytes = available_bytes

    def online(self, pages: RangeSet) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        blocks = self._blocks(pages)
        while missing := [block for block in blocks if _state(block) == _GONE]:
            if time.monotonic() > deadline_s:
                raise Refused(f"the guest's kernel shows no memory block {missing[0].name}")
            time.sleep(_POLL_S)
        blocks = [block for block in blocks if _state(block) == "offline"]
        self._set_all(blocks, "online_movable", "offline", deadline_s)

    def offline(self, pages: RangeSet) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        blocks = [b for b in self._blocks(pages) if _state(b) not in ("offline", _GONE)]
        self._wait_for_memory(len(blocks) * self._block_bytes())
        self._set_all(blocks, "offline", "online_movable", deadline_s)

    def _wait_for_memory(self, going_bytes: int) -> None:
        """Wait until `going_bytes` plus 32 MiB are available; return at once if `going_bytes` is 0.

        :raises Refused: there is too little available memory in time.
        """
        # The kernel moves the used pages of blocks that go offline into other memory. If there is
        # not enough free memory for these pages, the kernel kills processes instead of refusing.
        deadline_s = time.monotonic() + min(_FREE_MEMORY_TIMEOUT_S, self._timeout_s)
        while going_bytes and (left := self._available_bytes() - going_bytes) < _SPARE_BYTES:
            if time.monotonic() > deadline_s:
                raise Refused(
                    f"the memory is in use: the guest has only "
                    f"{format_size(left + going_bytes)} available, of which it must keep "
                    f"{format_size(_SPARE_BYTES)}"
                )
            time.sleep(_POLL_S)

    def _blocks(self, pages: RangeSet) -> list[Path]:
        """Return the sysfs folders of the blocks that `pages` consist of; they need not exist.

        :raises Refused: `pages` are not whole blocks, or this kernel has no memory blocks.
        """
        block_pages = self._block_bytes() // PAGE_BYTES
        if any(pfn % block_pages or count % block_pages for pfn, count in pages):
            raise Refused(
                "not whole memory blocks: those of this guest have"
                f" {block_pages * PAGE_BYTES} bytes each"
            )
        return [
            self._root / f"memory{start // block_pages}"
            for pfn, count in pages
            for start in range(pfn, pfn + count, block_pages)
        ]

    def _block_bytes(self) -> int:
        try:
            return int((self._root / "block_size_bytes").read_text(), 16)
        except FileNotFoundError:
            raise Refused("the guest's kernel has no memory hotplug") from None

    def _set_all(self, blocks: list[Path], wanted: str, before: str, deadline_s: float) -> None:
        """Change the state of all blocks to `wanted`, or of none.

        :raises Refused: the kernel did not change a block in time. The blocks before it were
            set back to the state `before`; the message names those that could not be set back.
        """
        for i, block in enumerate(blocks):
            if not _set(block, wanted, deadline_s):
                again_until_s = time.monotonic() + self._timeout_s
                stuck = [b.name for b in blocks[:i] if not _set(b, before, again_until_s)]
                why = "it is in use" if wanted == "offline" else "the kernel refused it"
                state = _state(block)
                problem = "is gone" if state == _GONE else f"stays {state}: {why}"
                also = f"; {', '.join(stuck)} did not become {before} again" if stuck else ""
                raise Refused(f"memory block {block.name} {problem}{also}")


def _state(block: Path) -> str:
    """Return a block's state; `gone` if the kernel does not have the block (yet, or any more)."""
    try:
        return (block / "state").read_text().strip()
    except OSError:
        return _GONE


def _set(block: Path, wanted: str, deadline_s: float) -> bool:
    """Change a block's state; return False if the kernel has not changed it by the deadline, or has
    removed the block."""
    # If the kernel cannot empty a block, the write to the block's state file does not return until
    # the writer gets a signal (mm/memory_hotplug.c: offline_pages). So the writer is a process of
    # its own, which can be killed.
    command = ["/bin/sh", "-c", 'echo "$1" > "$0"', str(block / "state"), wanted]
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            done = subprocess.run(command, timeout=left_s, capture_output=True, check=False)
        except subprocess.TimeoutExpired:
            return False
        # The kernel refuses a state that the block has already: meanwhile the kernel itself
        # (memhp_default_state) or a rule of udev may have changed it.
        state = _state(block)
        if not done.returncode or wanted.startswith(state):
            return True
        if state == _GONE:
            return False
        # A block with chunks in the hugetlb pool is refused at once (mm/hugetlb.c:
        # dissolve_free_huge_page). The pass that moved them there ends soon: try again.
        time.sleep(min(_POLL_S, left_s))
    return False
