"""Decides how a run ended. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How a run ended.

    :ivar state: done, undecided, failed or interrupted. A failed or interrupted run can be
        resumed, and so can an undecided run that has lost trials.
    :ivar reason: why the run is not done; empty if it is done.
    """

    state: str
    reason: str = ""


def run_outcome(error: BaseException | None, undecided: Sequence[str]) -> RunOutcome:
    """Return the outcome of a run that has ended.

    :param error: the exception that ended the run; None if no exception ended it.
    :param undecided: the reasons of the trials whose last attempts are undecided or lost, without
        the undecided blocks of a switchback.
    """
    if isinstance(error, KeyboardInterrupt):
        return RunOutcome(state="interrupted", reason="interrupted by the user")
    if error is not None:
        reason = getattr(error, "message", "") or f"{type(error).__name__}: {error}"
        return RunOutcome(state="failed", reason=reason)
    if undecided:
        return RunOutcome(state="undecided", reason="; ".join(undecided))
    return RunOutcome(state="done")
