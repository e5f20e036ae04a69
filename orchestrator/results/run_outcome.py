"""What a run came to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a run ended.

    :ivar state: done, undecided, failed or interrupted. The last two can be taken up again.
    :ivar reason: why it is not done; empty if it is.
    """

    state: str
    reason: str = ""


def run_outcome(error: BaseException | None, undecided: Sequence[str]) -> RunOutcome:
    """Judge a run that has ended.

    :param error: what it ended by; None if it came to its end.
    :param undecided: why trials count for nothing, each by its last attempt.
    """
    if isinstance(error, KeyboardInterrupt):
        return RunOutcome(state="interrupted", reason="interrupted by the user")
    if error is not None:
        said = getattr(error, "message", "") or f"{type(error).__name__}: {error}"
        return RunOutcome(state="failed", reason=said)
    if undecided:
        return RunOutcome(state="undecided", reason="; ".join(undecided))
    return RunOutcome(state="done")
