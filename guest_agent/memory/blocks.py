"""Hot-plugged memory of a real guest: the memory blocks of its kernel.

Documentation/admin-guide/mm/memory-hotplug.rst. A block comes offline, and is put into
ZONE_MOVABLE, where the kernel has nothing that it could not move away: so it can be
unplugged again. A kernel whose own policy (memhp_default_state) onlines it does no harm.
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

_PATIENCE_S = 30.0
_ROOM_PATIENCE_S = 3.0
"""Longer than chunks stay isolated."""
_PAUSE_S = 0.1
_SPARE_BYTES = 32 * MIB
"""What must be left to the guest beyond its watermarks."""


class MemoryBlocks:
    """On- and offlines whole blocks; needs root."""

    def __init__(
        self,
        root: Path = Path("/sys/devices/system/memory"),
        patience_s: float = _PATIENCE_S,
        available_bytes: Callable[[], int] = mem_available_bytes,
    ) -> None:
        """Nothing is looked at yet.

        :param patience_s: how long the kernel may take to show new blocks, or to empty
            those that are to go.
        """
        self._root = root
        self._patience_s = patience_s
        self._available_bytes = available_bytes

    def online(self, pages: RangeSet) -> None:
        deadline_s = time.monotonic() + self._patience_s
        blocks = self._blocks(pages)
        while missing := [block for block in blocks if not (block / "state").exists()]:
            if time.monotonic() > deadline_s:
                raise Refused(f"the guest's kernel shows no memory block {missing[0].name}")
            time.sleep(_PAUSE_S)
        blocks = [block for block in blocks if _state(block) == "offline"]
        self._set_all(blocks, "online_movable", "offline", deadline_s)

    def offline(self, pages: RangeSet) -> None:
        deadline_s = time.monotonic() + self._patience_s
        blocks = [b for b in self._blocks(pages) if b.exists() and _state(b) != "offline"]
        self._wait_for_room(len(blocks) * self._block_bytes())
        self._set_all(blocks, "offline", "online_movable", deadline_s)

    def _wait_for_room(self, going_bytes: int) -> None:
        """Wait until the guest can do without so much. What is used of it moves elsewhere; a
        kernel that has no room for that kills processes rather than give up.

        :raises Refused: it could not in time.
        """
        deadline_s = time.monotonic() + min(_ROOM_PATIENCE_S, self._patience_s)
        while going_bytes and (left := self._available_bytes() - going_bytes) < _SPARE_BYTES:
            if time.monotonic() > deadline_s:
                raise Refused(
                    f"the memory is in use: the guest can do without "
                    f"{format_size(left + going_bytes)} only, less a spare of "
                    f"{format_size(_SPARE_BYTES)}"
                )
            time.sleep(_PAUSE_S)

    def _blocks(self, pages: RangeSet) -> list[Path]:
        """The blocks that make up `pages`.

        :raises Refused: no set of whole blocks does, or this kernel has no blocks.
        """
        block_pages = self._block_bytes() // PAGE_BYTES
        if any(pfn % block_pages or count % block_pages for pfn, count in pages):
            raise Refused(f"the guest's memory blocks have {block_pages * PAGE_BYTES} bytes")
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
        """Bring all blocks into a state, or none.

        :raises Refused: the kernel would not, in time. Says which blocks it would not bring
            back to the state `before`, either.
        """
        for i, block in enumerate(blocks):
            if not _set(block, wanted, deadline_s):
                again_until_s = time.monotonic() + self._patience_s
                stuck = [b.name for b in blocks[:i] if not _set(b, before, again_until_s)]
                why = "it is in use" if wanted == "offline" else "the kernel would not take it"
                also = f"; {', '.join(stuck)} did not become {before} again" if stuck else ""
                raise Refused(f"memory block {block.name} stays {_state(block)}: {why}{also}")


def _state(block: Path) -> str:
    return (block / "state").read_text().strip()


def _set(block: Path, wanted: str, deadline_s: float) -> bool:
    """Have the kernel change a block's state; False if it did not until the deadline.

    A block with chunks in the hugetlb pool is refused at once (mm/hugetlb.c:
    dissolve_free_huge_page), and the pass that moved them there is over soon: try again.
    A block that cannot be emptied keeps the writer in the kernel until a signal comes
    (mm/memory_hotplug.c: offline_pages), so the writer is a process that can have one.
    """
    command = ["/bin/sh", "-c", 'echo "$1" > "$0"', str(block / "state"), wanted]
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            done = subprocess.run(command, timeout=left_s, capture_output=True, check=False)
        except subprocess.TimeoutExpired:
            return False
        if not done.returncode:
            return True
        time.sleep(min(_PAUSE_S, left_s))
    return False
