"""Runs one host's part of a block of a switchback, on guests that are there already: pauses their
hinting or lets it go on, and receives samples. It makes, resizes, settles, verifies and ends no
guest.

The measured time begins when the cut is over. Its beginning and end are times of the host's clock,
as those of samples. A block that is left out is undecided (results/trial_outcome.py), and its pair
is in no figure (view `left_out_pairs`, results/store/database.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing, suppress

from hintfleet.errors import (
    GuestLost,
    HintfleetError,
    NotFound,
    Refused,
    StableError,
    TransientError,
)
from hintfleet.settings import Driver, Method
from hintfleet.v1 import host_pb2
from orchestrator.spec.switchback import Switchback
from orchestrator.trial.host_client import HostClient
from orchestrator.trial.plan import HostTask
from orchestrator.trial.records import (
    BLOCK,
    BLOCK_END,
    CUT,
    GuestEnded,
    HostSamples,
    StepDone,
)
from orchestrator.trial.script import Script, cancelled, now_us

# For how long hinting is paused at a time, and how often the pause is renewed: if this process is
# lost, the guests hint again within the first of these times.
_PAUSE_S = 60.0
_RENEWED_EVERY_S = 20.0
_HAND_BACK_S = 5.0
_POLL_S = 1.0
# How long to wait for a sample: 8 sample periods, as a host agent leaves out up to three samples in
# a row, and 10 s more.
_PERIODS_WITHOUT_SAMPLES = 8
_SAMPLE_TIMEOUT_S = 10.0


class LeftOut(HintfleetError):
    """The block does not count; the message says why."""


def check_guests(
    host: str, driver: Driver, names: Sequence[str], listed: Iterable[host_pb2.Guest]
) -> None:
    """Check that a host has the guests of a switchback, and that their hinting can be paused.

    :param names: empty for all attached guests.
    :raises Refused: a named guest is missing, or has another method than hinting or another driver;
        or no guest is named and none is attached.
    """
    guests = {guest.name: guest for guest in listed}
    if not names and not any(map(_is_attached, guests.values())):
        raise Refused(f"{host} has no attached guest", hint="hintfleet attach DOMAIN")
    kinds = ("embedded",) if driver is Driver.EMBEDDED else ("libvirt", "attached")
    for name in names:
        if name not in guests:
            raise Refused(
                f"{host} has no guest {name!r}; it has {', '.join(sorted(guests)) or 'none'}",
                hint="`hintfleet guests` shows their names, `hintfleet attach` attaches a domain",
            )
        spec = guests[name].spec
        if spec.method != host_pb2.HINTING:
            method = host_pb2.Method.Name(spec.method).lower()
            raise Refused(f"{host}: guest {name} has method {method}, so it has no hinting to turn")
        if (kind := host_pb2.Driver.Name(spec.driver).lower()) not in kinds:
            raise Refused(f"{host}: guest {name} is {kind}, but the driver of the spec is {driver}")


def boots_of(names: Sequence[str], listed: Iterable[host_pb2.Guest]) -> tuple[dict[str, str], str]:
    """Return the boot id of each guest of a block, by name; and why the block cannot begin yet,
    empty if it can.

    :param names: empty for the attached guests that have a session now.
    """
    guests = {guest.name: guest for guest in listed}
    names = names or [n for n, guest in guests.items() if _is_attached(guest) and guest.boot_id]
    if not names:
        return {}, "no attached guest has a hinting session"
    for name in names:
        if name not in guests:
            return {}, f"{name} is not there"
        if not guests[name].boot_id:
            return {}, f"{name} has no hinting session: {guests[name].not_hinting_because}"
    return {name: guests[name].boot_id for name in names}, ""


def why_left_out(boots: Mapping[str, str], listed: Iterable[host_pb2.Guest]) -> str:
    """Return why a block does not count: which guest, the first one found, has ended or booted
    since the block began, or has no session now. Empty if there is none. A guest that lost its
    session and has a new one in the same boot is not found.

    :param boots: as `boots_of` returned them.
    """
    guests = {guest.name: guest for guest in listed}
    for name, boot in boots.items():
        if name not in guests:
            return f"{name} was detached or ended in this block"
        if guests[name].boot_id and guests[name].boot_id != boot:
            return f"{name} was restarted in this block"
        if not guests[name].boot_id:
            return f"{name} lost its hinting in this block: {guests[name].not_hinting_because}"
    return ""


def _is_attached(guest: host_pb2.Guest) -> bool:
    return guest.spec.driver == host_pb2.ATTACHED and guest.spec.method == host_pb2.HINTING


class BlockRunner(Script):
    """The script of one host's part of a block."""

    def __init__(self, client: HostClient, task: HostTask, switchback: Switchback) -> None:
        super().__init__(task)
        self._client = client
        self._cut_us = round(switchback.carry_over_s * 1e6)
        self._pauses = task.trial.arm.method is Method.NONE
        self._boots: Mapping[str, str] = {}
        """The boot id of each guest, by its name."""
        self._last: dict[str, host_pb2.Sample] = {}
        """The last sample of each guest."""
        self._sampled_us = 0
        """When they were made, on the host's clock."""
        self._sampled_s = 0.0
        """When they came, on this machine's monotonic clock."""
        self._sample_came = asyncio.Event()
        self._renew_s = 0.0

    async def _outcome(self) -> tuple[str, bool]:
        try:
            self._boots = await self._wait_until_there()
            await self._watched_block()
        except LeftOut as error:
            return error.message, False
        except StableError:
            raise
        except HintfleetError as error:
            return f"{self._task.host}: its host agent was lost: {error.message}", True
        return "", False

    async def _wait_until_there(self) -> dict[str, str]:
        """Wait until each named guest is there and has a session; if none is named, until any
        attached guest has one. Return the boot ids of these guests by name.

        Waits as long as the block would last: so a guest that is down for the time of one block
        spoils about one block, not all that are left.

        :raises LeftOut: the time is over.
        """
        names = [guest.name for guest in self._task.guests]
        deadline_s = time.monotonic() + self._task.block_s
        while True:
            listed = await self._client.list_guests()
            boots, problem = boots_of(names, listed)
            if not problem:
                for guest in listed:
                    if guest.name in boots:
                        self._note_hypervisor(guest)
                return boots
            if time.monotonic() > deadline_s:
                raise LeftOut(problem)
            await asyncio.sleep(_POLL_S)

    async def _watched_block(self) -> None:
        self._sampled_s = time.monotonic()
        watch = asyncio.create_task(self._watch())
        block = asyncio.create_task(self._block())
        try:
            await asyncio.wait((watch, block), return_when=asyncio.FIRST_COMPLETED)
            await (block if block.done() else watch)
        finally:
            try:
                await cancelled(block, watch)
            finally:
                if self._pauses:
                    await self._hand_back()

    async def _hand_back(self) -> None:
        """End the pause; give up after 5 s."""
        ending = asyncio.create_task(self._pause(0))
        until_s = time.monotonic() + _HAND_BACK_S
        while not ending.done() and (left_s := until_s - time.monotonic()) > 0:
            # When a run is cut off, this task may be cancelled twice: at the end of the trial, and
            # at that of the actor. The guests must get their hinting back all the same.
            with suppress(asyncio.CancelledError):
                await asyncio.wait((ending,), timeout=left_s)
        await cancelled(ending)

    async def _watch(self) -> None:
        # `aclosing` closes the stream: a LeftOut leaves the loop while the stream is open.
        async with aclosing(self._client.watch_host(self._task.spec.sample_period_s)) as stream:
            async for samples in stream:
                if samples.at_unix_us < self._sampled_us:
                    raise LeftOut(f"the clock of {self._task.host} was set back in this block")
                found = {s.guest_name: s for s in samples.samples if s.guest_name in self._boots}
                if len(found) < len(self._boots):
                    raise LeftOut(await self._why_left_out() or "a guest was lost in this block")
                del samples.samples[:]
                samples.samples.extend(found.values())
                self._post(HostSamples(host=self._task.host, samples=samples))
                self._last, self._sampled_us = found, samples.at_unix_us
                self._sampled_s = time.monotonic()
                self._sample_came.set()
        raise TransientError(f"{self._task.host}: the host agent ended the samples")

    async def _block(self) -> None:
        await self._pass(1)
        await self._pause(_PAUSE_S if self._pauses else 0)
        await self._pass(self._sampled_us + 1)
        begin_us = self._sampled_us
        start_us, end_us = begin_us + self._cut_us, begin_us + round(self._task.block_s * 1e6)
        self._announce(CUT, self._cut_us / 1e6)
        await self._pass(start_us)
        at_start = self._last
        self._announce(BLOCK, (end_us - start_us) / 1e6)
        await self._pass(end_us)
        at_end = self._last
        self._announce(BLOCK_END, 0)
        await self._check()
        for name in self._boots:
            self._post_step(name, CUT, begin_us, start_us)
            self._post_step(name, BLOCK, start_us, end_us)
            self._post_step(name, BLOCK_END, end_us, end_us)
            self._post_books(name, at_start[name].ledger, at_end[name].ledger)

    async def _pass(self, until_us: int) -> None:
        """Wait until there are samples from this time of the host's clock or later; meanwhile renew
        the pause, if there is one.

        :raises LeftOut: no samples came for too long, although the host agent answers; or a guest's
            pause had ended.
        :raises TransientError: no samples came for too long, and the host agent does not answer.
        """
        timeout_s = _PERIODS_WITHOUT_SAMPLES * self._task.spec.sample_period_s + _SAMPLE_TIMEOUT_S
        while self._sampled_us < until_us:
            if self._renew_s and time.monotonic() > self._renew_s:
                await self._renew()
            if time.monotonic() > self._sampled_s + timeout_s:
                why = f"{self._task.host}: no samples for {timeout_s:.0f} s"
                raise TransientError(why) if await self._client.is_silent() else LeftOut(why)
            self._sample_came.clear()
            # Not asyncio.wait_for: in Python 3.11 it loses a cancellation that comes together with
            # a sample (python/cpython#86296), and the block would go on to its end.
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._sample_came.wait()

    async def _renew(self) -> None:
        left_s = await self._pause(_PAUSE_S)
        if lapsed := [name for name, one_s in left_s.items() if not one_s]:
            raise LeftOut(f"{lapsed[0]} hinted in this block: its pause had ended")

    async def _check(self) -> None:
        """End the pause, and check that each guest was paused until now, or was not paused just
        before, as the arm wants it.

        :raises LeftOut: one was otherwise, has ended or booted, or has no session.
        """
        left_s = await self._pause(0)
        if why := await self._why_left_out():
            raise LeftOut(why)
        for name, one_s in left_s.items():
            if bool(one_s) != self._pauses:
                what = "hinted: its pause had ended" if self._pauses else "was paused by others"
                raise LeftOut(f"{name} {what} in this block")

    async def _pause(self, for_s: float) -> dict[str, float]:
        """Pause the hinting of all guests of the block for `for_s`; 0 ends the pause. Return how
        many seconds of its earlier pause each guest had left, by name; 0 if it was not paused."""
        self._renew_s = time.monotonic() + _RENEWED_EVERY_S if for_s else 0.0
        calls = (self._pause_one(name, for_s) for name in self._boots)
        # With return_exceptions, all calls have ended here, also after an error of one.
        left_s: dict[str, float] = {}
        for name, found in zip(
            self._boots, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(found, BaseException):
                raise found
            left_s[name] = found
        return left_s

    async def _pause_one(self, name: str, for_s: float) -> float:
        try:
            return await self._client.pause_hinting(name, for_s)
        except (GuestLost, NotFound) as error:
            raise LeftOut(await self._why_left_out() or error.message) from error

    async def _why_left_out(self) -> str:
        return why_left_out(self._boots, await self._client.list_guests())

    def _post_step(self, guest: str, kind: str, start_us: int, end_us: int) -> None:
        done = StepDone(
            host=self._task.host,
            trial_id=self._task.trial.trial_id,
            guest=guest,
            at_unix_us=end_us,
            kind=kind,
            changed_bytes=0,
            held_bytes=0,
            verified_pages=0,
            wrong_pages=0,
            duration_us=end_us - start_us,
        )
        self._post(done)

    def _post_books(self, guest: str, start: host_pb2.Ledger, end: host_pb2.Ledger) -> None:
        ended = GuestEnded(
            host=self._task.host,
            trial_id=self._task.trial.trial_id,
            guest=guest,
            at_unix_us=now_us(),
            provisioned_bytes=end.provisioned_bytes,
            reclaimed_now_bytes=end.reclaimed_now_bytes,
            refaulted_total_bytes=end.refaulted_total_bytes - start.refaulted_total_bytes,
        )
        self._post(ended)
