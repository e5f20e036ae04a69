"""The back end's side of vhost-user, for a device that nobody uses. Pure: messages and
descriptors in, actions out.

QEMU is the front end. It sends where the guest's RAM is (the table), and starts the device's queues
when the guest's driver is ready. Before it stops or resets the guest, or removes the device, it
stops the queues and waits for the answer. The device exists only for the table and this wait: its
queues are never processed. Source: docs/interop/vhost-user.rst and hw/virtio/vhost-user.c of QEMU.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from hintfleet.errors import InvalidInput
from hintfleet.units import PAGE_BYTES

HEADER = struct.Struct("=III")
"""Request, flags, size of the payload."""
MAX_PAYLOAD_BYTES = 1024
MAX_DESCRIPTORS = 8
"""The most that one message may carry: a SET_MEM_TABLE has eight regions at most."""

# At least as many as QEMU itself allows (VHOST_USER_MAX_RAM_SLOTS). QEMU does not plug memory into
# a guest that would then have more regions than the back end allows.
MAX_REGIONS = 512
# Guest physical addresses have 52 bits at most (x86-64). Offsets in files get the same bound.
_MAX_ADDRESS = 1 << 52
_MAX_QUEUES = 256

_VERSION = 1
_VERSION_MASK = 3
_IS_REPLY = 1 << 2
_NEEDS_REPLY = 1 << 3

# Virtio feature bits: VHOST_USER_F_PROTOCOL_FEATURES and VIRTIO_F_VERSION_1.
_FEATURES = 1 << 30 | 1 << 32
_REPLY_ACK = 1 << 3
# Lets QEMU send the table region by region (ADD_MEM_REG), up to MAX_REGIONS.
_CONFIGURE_MEM_SLOTS = 1 << 15
_PROTOCOL_FEATURES = _REPLY_ACK | _CONFIGURE_MEM_SLOTS

_U64 = struct.Struct("=Q")
_RING_STATE = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_KICK_HAS_NO_FD = 1 << 8
_NO_FD = -1


class Request(IntEnum):
    """The requests that this back end handles. It refuses requests that are in `_UNANSWERABLE`. All
    other requests do nothing, and are acknowledged if QEMU asks for that."""

    GET_FEATURES = 1
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


_ANSWERS: dict[int, int] = {
    Request.GET_FEATURES: _FEATURES,
    Request.GET_PROTOCOL_FEATURES: _PROTOCOL_FEATURES,
    Request.GET_MAX_MEM_SLOTS: MAX_REGIONS,
}
# Requests that need an answer which this back end does not have. They belong to features that it
# does not offer, and end the connection.
_UNANSWERABLE = {
    17: "GET_QUEUE_NUM",
    24: "GET_CONFIG",
    28: "POSTCOPY_ADVISE",
    31: "GET_INFLIGHT_FD",
    40: "GET_STATUS",
    41: "GET_SHARED_OBJECT",
}


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the guest's RAM that lies in one piece in one file.

    :ivar address: address of the first byte, guest physical.
    :ivar user_address: the region's address in QEMU's own memory. With `address` and `size_bytes`,
        it identifies the region that QEMU removes.
    :ivar offset_bytes: offset of the first byte in the file.
    :ivar fd: the file. Whoever called `Backend.received` owns it, and closes it when a `Drop` names
        it, or when the connection ends.
    """

    address: int
    size_bytes: int
    user_address: int
    offset_bytes: int
    fd: int

    @property
    def end(self) -> int:
        """The guest physical address after the last byte."""
        return self.address + self.size_bytes


@dataclass(frozen=True)
class Stop:
    """Let no punch begin, end the epoch, and wait until no punch runs. Only after that carry out
    the actions that follow this one, such as the reply to QEMU."""


@dataclass(frozen=True)
class Start:
    """Punches may run from now on, in a new epoch."""


@dataclass(frozen=True)
class Table:
    """All RAM of the guest from now on; replaces the table before."""

    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Drop:
    """Close these descriptors."""

    fds: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """Send these bytes."""

    message: bytes


Action = Stop | Start | Table | Drop | Reply


class Backend:
    """One connection of a front end. After an error it must not be used any more."""

    def __init__(self) -> None:
        self.regions: tuple[Region, ...] = ()
        self.is_running = False
        """Whether the device runs: a `Start` was returned, and no `Stop` since."""
        self._acknowledges = False
        self._kicked: set[int] = set()
        self._disabled: set[int] = set()

    def received(
        self, request: int, flags: int, payload: bytes, fds: Sequence[int]
    ) -> Sequence[Action]:
        """Handle one message; return the actions to carry out, in this order.

        :param fds: the descriptors that came with it. Each of them is in a region of the returned
            `Table`, or in a returned `Drop`. After an error, the caller must close all of them.
        :raises InvalidInput: the message is not valid. The connection must be closed.
        """
        if flags & _VERSION_MASK != _VERSION or flags & _IS_REPLY:
            raise InvalidInput(f"vhost-user request {request} has flags {flags:#x}")
        if request in _UNANSWERABLE:
            raise InvalidInput(f"vhost-user {_UNANSWERABLE[request]} was not offered")
        if request == Request.SET_PROTOCOL_FEATURES:
            (wanted,) = _unpacked(_U64, payload)
            self._acknowledges = bool(wanted & _REPLY_ACK)
        actions = self._memory(request, payload, fds)
        if actions:
            fds = ()
        else:
            actions = self._queues(request, payload)
        if fds:
            actions.append(Drop(tuple(fds)))
        answer = self._answer(request, payload, must_acknowledge=bool(flags & _NEEDS_REPLY))
        if answer is not None:
            header = HEADER.pack(request, _VERSION | _IS_REPLY, len(answer))
            actions.append(Reply(header + answer))
        return [*actions, *self._started()]

    def _answer(self, request: int, payload: bytes, *, must_acknowledge: bool) -> bytes | None:
        if request in _ANSWERS:
            return _U64.pack(_ANSWERS[request])
        if request == Request.GET_VRING_BASE:
            # Answer with how far the queue was processed: 0, because nobody processes it.
            return _RING_STATE.pack(_unpacked(_RING_STATE, payload)[0], 0)
        return _U64.pack(0) if must_acknowledge and self._acknowledges else None

    def _memory(self, request: int, payload: bytes, fds: Sequence[int]) -> list[Action]:
        """Handle a message about the table, with its descriptors. For others, return no action."""
        match request:
            case Request.SET_MEM_TABLE:
                return self._table(_table(payload, fds))
            case Request.ADD_MEM_REG:
                if len(fds) != 1:
                    raise InvalidInput(f"a memory region came with {len(fds)} descriptors")
                return self._table((*self.regions, _region(payload, fds[0])))
            case Request.REM_MEM_REG:
                # The specification allows a descriptor in REM_MEM_REG. It is not needed: close it.
                actions = self._table(self._without(_region(payload, _NO_FD)))
                return [*actions, Drop(tuple(fds))] if fds else actions
        return []

    def _queues(self, request: int, payload: bytes) -> list[Action]:
        """Handle a message about the queues, or a reset of the device. Return a `Stop` if it stops
        the running device, else no action: a `Start` comes from `_started`."""
        match request:
            case Request.SET_VRING_KICK:
                (value,) = _unpacked(_U64, payload)
                self._kicked.add(_queue(value & ~_KICK_HAS_NO_FD))
            case Request.GET_VRING_BASE:
                index, _ = _unpacked(_RING_STATE, payload)
                self._kicked.discard(_queue(index))
                return self._stopped()
            case Request.SET_VRING_ENABLE:
                index, is_enabled = _unpacked(_RING_STATE, payload)
                if not is_enabled:
                    self._disabled.add(_queue(index))
                    return self._stopped()
                self._disabled.discard(index)
            case Request.RESET_OWNER | Request.RESET_DEVICE:
                self._kicked.clear()
                return self._stopped()
        return []

    def _started(self) -> list[Action]:
        if self.is_running or not self.regions or not self._kicked - self._disabled:
            return []
        self.is_running = True
        return [Start()]

    def _stopped(self) -> list[Action]:
        if not self.is_running:
            return []
        # A message that stops one queue stops the device, and so all of its queues.
        self.is_running = False
        self._kicked.clear()
        return [Stop()]

    def _table(self, regions: tuple[Region, ...]) -> list[Action]:
        _check_table(regions)
        kept = {region.fd for region in regions}
        dropped = tuple(r.fd for r in self.regions if r.fd not in kept)
        self.regions = tuple(sorted(regions, key=lambda r: r.address))
        return [Table(self.regions), *([Drop(dropped)] if dropped else [])]

    def _without(self, removed: Region) -> tuple[Region, ...]:
        key = (removed.address, removed.size_bytes, removed.user_address)
        left = tuple(r for r in self.regions if (r.address, r.size_bytes, r.user_address) != key)
        if len(left) == len(self.regions):
            raise InvalidInput(f"no memory region at {removed.address:#x} to remove")
        return left


def check_size(size_bytes: int) -> None:
    """Check the size of a payload before it is read.

    :raises InvalidInput: it is larger than any payload may be.
    """
    if size_bytes > MAX_PAYLOAD_BYTES:
        raise InvalidInput(f"a vhost-user message of {size_bytes} bytes")


def _unpacked(form: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise InvalidInput(f"a vhost-user payload of {len(payload)} bytes, not {form.size}")
    return form.unpack(payload)


def _queue(index: int) -> int:
    if index >= _MAX_QUEUES:
        raise InvalidInput(f"vhost-user queue {index}")
    return index


def _region(payload: bytes, fd: int) -> Region:
    # The payload is eight bytes of padding, then the region.
    if len(payload) != 8 + _REGION.size:
        raise InvalidInput(f"a memory region of {len(payload)} bytes")
    return _make_region(payload, 8, fd)


def _table(payload: bytes, fds: Sequence[int]) -> tuple[Region, ...]:
    # The payload is the number of regions, four bytes of padding, then the regions.
    if len(payload) != 8 + len(fds) * _REGION.size or payload[:4] != struct.pack("=I", len(fds)):
        raise InvalidInput(f"a memory table of {len(payload)} bytes and {len(fds)} descriptors")
    return tuple(_make_region(payload, 8 + i * _REGION.size, fd) for i, fd in enumerate(fds))


def _make_region(payload: bytes, at: int, fd: int) -> Region:
    address, size_bytes, user_address, offset_bytes = _REGION.unpack_from(payload, at)
    region = Region(
        address=address,
        size_bytes=size_bytes,
        user_address=user_address,
        offset_bytes=offset_bytes,
        fd=fd,
    )
    if not size_bytes or (address | size_bytes | offset_bytes) % PAGE_BYTES:
        raise InvalidInput(f"a memory region that is not in whole pages: {region}")
    if max(region.end, offset_bytes + size_bytes) > _MAX_ADDRESS:
        raise InvalidInput(f"a memory region beyond all addresses: {region}")
    return region


def _check_table(regions: tuple[Region, ...]) -> None:
    if len(regions) > MAX_REGIONS:
        raise InvalidInput(f"more than {MAX_REGIONS} memory regions")
    in_order = sorted(regions, key=lambda r: r.address)
    for below, above in pairwise(in_order):
        if below.end > above.address:
            raise InvalidInput(f"memory regions overlap: {below} and {above}")
