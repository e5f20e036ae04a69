"""Runs one host's part of a trial: creates guests, runs steps, settles, verifies and ends guests;
receives samples.

Uses neither Ray nor the store nor a view. results/trial_outcome.py decides how a trial with a lost
host or guest is counted, and whether it is run again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress

from hintfleet.errors import HintfleetError, Refused, StableError, TransientError
from hintfleet.settings import Method
from hintfleet.v1 import host_pb2
from orchestrator.spec.model import Spec
from orchestrator.spec.workload import Step
from orchestrator.trial.block_runner import BlockRunner
from orchestrator.trial.budget_watch import BudgetWatch, describe
from orchestrator.trial.guest_spec import guest_spec
from orchestrator.trial.host_client import HostClient
from orchestrator.trial.plan import GuestTask, HostTask
from orchestrator.trial.records import (
    Event,
    GuestEnded,
    GuestFits,
    GuestSettled,
    HostSamples,
)
from orchestrator.trial.script import Script, cancelled, now_us, records_of
from orchestrator.trial.steps import hold_request, step_done, step_request

# Three sets of samples come within so many periods: a host agent leaves out three in a row at most
# (host.proto: Watch).
_MOST_PERIODS = 12
# How much longer than the sample periods in which they are due to wait for samples: on a busy host
# they may be late. The footprint at an end of the measured window is interpolated
# (results/footprint.py): that needs a sample of each guest before and after the window.
_SAMPLE_TIMEOUT_S = 10.0
_SWAP_OUT_TIMEOUT_S = 60.0


def run_host_task(client: HostClient, task: HostTask) -> AsyncIterator[Event | HostSamples]:
    """Run one host's part of a trial; yield its events and samples, the last one a HostDone.

    If a guest or the host agent is lost, or a command fails with an error that is no StableError,
    the part ends early, and HostDone says why. If the iterator is closed early, the host agent ends
    the guests; those of a switchback hint again.

    :raises StableError: the host cannot run the trial, and another attempt would fail alike. There
        is no HostDone.
    """
    switchback = task.spec.switchback
    if switchback:
        return records_of(BlockRunner(client, task, switchback))
    return records_of(_TrialRunner(client, task))


class SamplesLate(TransientError):
    """A sample that the trial needs did not come in time: the host agent or its machine stood
    still."""


class StepFailed(HintfleetError):
    """A step was refused, as for lack of memory. Unlike Refused, this does not end the run."""


class _TrialRunner(Script):
    def __init__(self, client: HostClient, task: HostTask) -> None:
        super().__init__(task)
        self._client = client
        self._spec: Spec = task.spec
        self._trial = task.trial
        self._in_step = task.in_step
        self._sequence = 0
        self._held_bytes = dict.fromkeys((guest.name for guest in task.guests), 0)
        self._watching = asyncio.Event()
        self._sample_came = asyncio.Event()
        self._sample_sets = 0
        """How many sets of samples have come."""
        self._made_us = 0
        """When the last one was made, on the host's clock."""
        self._sampled_us: dict[str, int] = dict.fromkeys(self._held_bytes, -1)
        """When the last sample of each guest was made, on the host's clock."""
        self._last_step_us = 0
        self._budget = BudgetWatch()
        self._fitting: list[GuestTask] = []
        """Guests that have done their workload, if the figure is how many a host can run."""

    async def _outcome(self) -> tuple[str, bool]:
        """Run the script while a watch is open."""
        watch = asyncio.create_task(self._watch())
        script = asyncio.create_task(self._script())
        ran_out = asyncio.create_task(self._budget.ran_out.wait())
        try:
            # Wait for the first of these: the script ends, done or failed; the watch breaks; the
            # host runs out of memory.
            await asyncio.wait((watch, script, ran_out), return_when=asyncio.FIRST_COMPLETED)
            try:
                if not ran_out.done():
                    await (script if script.done() else watch)
            except StableError:
                raise
            except HintfleetError as error:
                # If a guest is lost, only the command fails. If the host agent is lost, the watch
                # breaks, too; if the host ran out of memory, a sample says so. Either may come
                # later than the command's error, so wait for it, or for samples without it.
                samples = asyncio.create_task(self._next_samples())
                try:
                    await asyncio.wait(
                        (watch, ran_out, samples), return_when=asyncio.FIRST_COMPLETED
                    )
                    none_came = samples.done() and not samples.result()
                    silent = none_came and await self._client.is_silent()
                finally:
                    await cancelled(samples)
                if watch.done() or (silent and not ran_out.done()):
                    return f"{self._task.host}: its host agent was lost: {error.message}", True
                if not ran_out.done():
                    return str(error), isinstance(error, SamplesLate)
            if not ran_out.done():
                return "", False
            await cancelled(script)
            return await self._end_out_of_memory(), False
        finally:
            # The script is cancelled first: its commands need the guests, which the host agent ends
            # when the watch ends.
            await cancelled(script, ran_out, watch)

    async def _end_out_of_memory(self) -> str:
        """Post that the host ran out of memory, and return why the trial is undecided. If the
        figure is how many guests it can run, read back those that fit, and return an empty text."""
        event = self._budget.event(self._task.host, self._trial.trial_id)
        self._post(event)
        if not self._spec.asks_how_many:
            return describe(event)
        self._announce("verify", 0.0)
        with suppress(HintfleetError):  # the kernel may have killed any of them
            await self._on(self._fitting, self._verify)
        return ""

    async def _watch(self) -> None:
        # `aclosing` closes the stream: the error leaves the loop while the stream is open.
        async with aclosing(
            self._client.watch(self._trial.trial_id, self._spec.sample_period_s)
        ) as stream:
            async for samples in stream:
                if samples.at_unix_us < self._made_us:  # the store orders samples by this time
                    raise TransientError(f"{self._task.host}: its clock was set back")
                self._made_us = made_us = samples.at_unix_us
                self._watching.set()
                self._post(HostSamples(host=self._task.host, samples=samples))
                self._budget.take(samples)
                self._sampled_us |= dict.fromkeys((s.guest_name for s in samples.samples), made_us)
                self._sample_sets += 1
                self._sample_came.set()
        raise TransientError(f"{self._task.host}: the host agent ended the samples")

    async def _script(self) -> None:
        # The host agent creates guests only while a watch of their trial is open.
        await self._wait_watching()
        one_by_one = self._spec.one_by_one
        for guests in [[one] for one in self._task.guests] if one_by_one else [self._task.guests]:
            await self._work(guests)
            if self._spec.asks_how_many:
                await self._on(guests, self._fits)
        self._announce("verify", 0.0)
        await self._on(self._task.guests, self._verify)
        await self._wait_for_samples(self._task.guests, since_us=self._last_step_us)
        await self._on(self._task.guests, self._destroy)

    async def _work(self, guests: Sequence[GuestTask]) -> None:
        """Create guests, and have them do all steps of their workload: in step, or each by
        itself."""
        await self._on(guests, self._create)
        await self._wait_for_samples(guests, since_us=0)
        if not self._in_step:
            await self._on(guests, self._work_alone)
            return
        for i, step in enumerate(guests[0].steps):
            await self._run_phase(guests, i, step)

    async def _work_alone(self, guest: GuestTask) -> None:
        await asyncio.sleep(guest.begins_s)
        for i, step in enumerate(guest.steps):
            await self._run_phase([guest], i, step)

    async def _fits(self, guest: GuestTask) -> None:
        """Wait for a sample of this guest, and of all that fit, after the last step; then post that
        the guest fits, unless the host ran out of memory.

        :raises SamplesLate: no samples came in time.
        :raises TransientError: one of the guests sends no samples any more: it has ended. Or the
            host stays above its memory budget.
        """
        there, since_us = [*self._fitting, guest], self._last_step_us
        if not await self._wait_for_samples(there, since_us=since_us):
            if self._made_us < since_us:
                raise SamplesLate(f"{self._task.host}: no sample of {guest.name} in time")
            gone = next(one.name for one in there if self._sampled_us[one.name] < since_us)
            raise TransientError(f"{gone} sends no samples any more")
        # With swap, the kernel may still be swapping out what does not fit.
        if not await self._sampled(lambda: not self._budget.is_over, _SWAP_OUT_TIMEOUT_S):
            raise TransientError(f"{self._task.host}: stays above its memory")
        if self._budget.ran_out.is_set():
            return  # the script is about to be cancelled
        self._fitting.append(guest)
        self._post(
            GuestFits(
                host=self._task.host,
                trial_id=self._trial.trial_id,
                guest=guest.name,
                at_unix_us=now_us(),
                used_bytes=self._budget.used_bytes,
            )
        )

    async def _wait_watching(self) -> None:
        try:
            # The host agent first ends the guests that an earlier trial has left, if any; one that
            # is being made is made first.
            timeouts = self._spec.timeouts
            async with asyncio.timeout(timeouts.create_s + timeouts.destroy_s + _SAMPLE_TIMEOUT_S):
                await self._watching.wait()
        except TimeoutError:
            raise SamplesLate(f"{self._task.host}: no samples from the host agent") from None

    async def _wait_for_samples(self, guests: Sequence[GuestTask], since_us: int) -> bool:
        """Wait until there is a sample of each of these guests from `since_us` or later, on the
        host's clock, but only for two sample periods and 10 s; return whether there is. Without
        one, the trial may have no footprint."""
        return await self._sampled(
            lambda: min(self._sampled_us[guest.name] for guest in guests) >= since_us,
            2 * self._spec.sample_period_s + _SAMPLE_TIMEOUT_S,
        )

    async def _next_samples(self) -> bool:
        """Wait for samples that were made after this call, but only for 12 sample periods and 10 s;
        return whether they came."""
        # The first that comes may have been made before; so may the second, which the host agent
        # had left out, and sends together with a third.
        enough = self._sample_sets + 3
        return await self._sampled(
            lambda: self._sample_sets >= enough,
            _MOST_PERIODS * self._spec.sample_period_s + _SAMPLE_TIMEOUT_S,
        )

    async def _sampled(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `holds` returns True, called at once and after each sample set, or until the
        time is over; return what it returns then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not holds():
                    self._sample_came.clear()
                    await self._sample_came.wait()
        return holds()

    async def _run_phase(self, guests: Sequence[GuestTask], index: int, step: Step) -> None:
        about = f"{guests[0].name}: " if self._spec.one_by_one else ""
        # Of guests that are not in step, only the first one's steps are announced: a view shows one
        # phase for each host.
        if self._in_step or guests[0] is self._task.guests[0]:
            alone = "" if self._in_step else guests[0].name
            self._announce(f"{about}{step.title}", step.hold_s, alone)
        do = self._replay if step.points else self._step
        await self._on(guests, lambda guest: do(guest, index, step))
        if step.settle and self._trial.arm.method is not Method.NONE:
            await self._on(guests, self._settle)
        await asyncio.sleep(step.hold_s)

    async def _create(self, guest: GuestTask) -> None:
        made = await self._client.create_guest(
            host_pb2.CreateGuestRequest(
                command=self._command(), name=guest.name, spec=guest_spec(self._task, guest)
            )
        )
        self._note_hypervisor(made)

    async def _step(self, guest: GuestTask, index: int, step: Step) -> None:
        size_bytes = step.size_bytes(self._held_bytes[guest.name], guest.kind.memory_bytes)
        request = step_request(step, size_bytes, guest.step_seeds[index])
        self._post_step(guest, step, [await self._run_step(guest, request)])

    async def _replay(self, guest: GuestTask, index: int, step: Step) -> None:
        """Have a guest hold what each point says, from its time on; post one record of all."""
        began_s = time.monotonic()
        answers: list[host_pb2.RunStepResponse] = []
        try:
            for i, point in enumerate(step.points):
                await asyncio.sleep(max(0.0, began_s + point.at_s - time.monotonic()))
                grow_bytes = point.held_bytes - self._held_bytes[guest.name]
                request = hold_request(grow_bytes, guest.step_seeds[index] + i)
                answers.append(await self._run_step(guest, request))
        finally:
            # Also after an error: pages that came back wrong before it are a result.
            if answers:
                self._post_step(guest, step, answers)

    async def _verify(self, guest: GuestTask) -> None:
        request = host_pb2.RunStepRequest(verify=True)
        self._post_step(guest, None, [await self._run_step(guest, request)])

    async def _run_step(
        self, guest: GuestTask, request: host_pb2.RunStepRequest
    ) -> host_pb2.RunStepResponse:
        request.command.CopyFrom(self._command())
        request.guest_name = guest.name
        try:
            done = await self._client.run_step(request)
        except Refused as error:
            # Not raised as Refused, a StableError, which would end the run: the method under test
            # may be why a guest runs out of memory, or why a program fails in it.
            raise StepFailed(error.message, hint=error.hint) from error
        self._held_bytes[guest.name] = done.held_bytes
        self._last_step_us = max(self._last_step_us, done.done_at_unix_us)
        return done

    def _post_step(
        self, guest: GuestTask, step: Step | None, answers: Sequence[host_pb2.RunStepResponse]
    ) -> None:
        """Post the record of a step, whose parts have these answers; `step` is None for the
        read-back."""
        self._post(step_done(self._task.host, self._trial.trial_id, guest.name, step, answers))

    async def _settle(self, guest: GuestTask) -> None:
        began_s = time.monotonic()
        settled = await self._client.settle(guest.name)
        took_s = time.monotonic() - began_s
        self._post(
            GuestSettled(
                host=self._task.host,
                trial_id=self._trial.trial_id,
                guest=guest.name,
                at_unix_us=now_us(),
                batches=settled.batches,
                hinted_bytes=settled.hinted_bytes,
                duration_us=round(took_s * 1e6),
            )
        )

    async def _destroy(self, guest: GuestTask) -> None:
        closed = await self._client.destroy_guest(
            host_pb2.DestroyGuestRequest(command=self._command(), name=guest.name)
        )
        self._post(
            GuestEnded(
                host=self._task.host,
                trial_id=self._trial.trial_id,
                guest=guest.name,
                at_unix_us=now_us(),
                provisioned_bytes=closed.ledger.provisioned_bytes,
                reclaimed_now_bytes=closed.ledger.reclaimed_now_bytes,
                refaulted_total_bytes=closed.ledger.refaulted_total_bytes,
            )
        )

    async def _on(
        self, guests: Sequence[GuestTask], action: Callable[[GuestTask], Awaitable[None]]
    ) -> None:
        """Call `action` for these guests at once; when all calls have ended, raise one of the
        errors, if there are any."""
        # Without return_exceptions, gather() would raise the first error at once and leave the
        # other calls running; nobody would see their errors.
        results = await asyncio.gather(*(action(guest) for guest in guests), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _command(self) -> host_pb2.CommandId:
        self._sequence += 1
        return host_pb2.CommandId(
            run_id=self._trial.run_id, trial_id=self._trial.trial_id, sequence=self._sequence
        )
