"""Runs in an embedded guest when Python starts there, and plants a bug: the agent releases each
batch as soon as it has sent it."""

import sys
from collections.abc import Sequence

if "guest_agent" in sys.orig_argv:
    from guest_agent.hinting import HintingCore, Instruction, Release, Send

    isolated = HintingCore.isolated

    def isolated_and_released(
        self: HintingCore, *args: object, **kwargs: object
    ) -> Sequence[Instruction]:
        made: list[Instruction] = []
        for instruction in isolated(self, *args, **kwargs):  # type: ignore[arg-type]
            made.append(instruction)
            if isinstance(instruction, Send):
                made.append(Release(instruction.ranges, hinted=True))
        return made

    HintingCore.isolated = isolated_and_released  # type: ignore[method-assign]
    acknowledged = HintingCore.acknowledged
    HintingCore.acknowledged = lambda *args, **kwargs: [  # type: ignore[method-assign]
        one for one in acknowledged(*args, **kwargs) if not isinstance(one, Release)
    ]
