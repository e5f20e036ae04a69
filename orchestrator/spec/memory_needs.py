"""How much memory a run needs, on this machine alone or on the node of each host. Pure."""

from __future__ import annotations

import math

from hintfleet.settings import Driver
from hintfleet.units import MIB
from orchestrator.spec.guests import GuestClass
from orchestrator.spec.model import Spec
from orchestrator.spec.workload import steps_of, total_allocated_bytes

_EMBEDDED_PROCESS_BYTES = 48 * MIB  # a guest process apart from its RAM: Python and gRPC
_QEMU_PROCESS_BYTES = 96 * MIB  # QEMU apart from the guest's RAM, TCG's translations included
# The four from _FLEET_BYTES on were measured in memory cgroups, program text in use included.
_FLEET_BYTES = 480 * MIB  # the command itself and a private Ray cluster
ACTOR_BYTES = 64 * MIB  # a Ray actor without hosts
_SESSION_BYTES = 1 * MIB  # what a host adds to its actor; measured without TLS: 0.2 MiB
_HOST_AGENT_BYTES = 32 * MIB
HOSTS_PER_ACTOR = 32
"""The most hosts that an actor carries; more if its node has too few processors for so many
actors."""


def needed_bytes(spec: Spec) -> int:
    """Return the most bytes of memory that a run on this machine alone can use at once.

    Counted are the command, Ray, its actors and the hosts.
    """
    actors_bytes = math.ceil(spec.hosts.number / HOSTS_PER_ACTOR) * ACTOR_BYTES
    return _FLEET_BYTES + actors_bytes + spec.hosts.number * host_bytes(spec)


def host_bytes(spec: Spec) -> int:
    """Return the most bytes of memory that a host can use on its node at once.

    Counted is what it adds to its actor; for a logical host also the host agent and the guests.
    """
    if spec.hosts.agents:
        return _SESSION_BYTES
    guests_bytes = could_become_resident_bytes(spec) // spec.hosts.number
    return guests_bytes + _HOST_AGENT_BYTES + _SESSION_BYTES


def could_become_resident_bytes(spec: Spec) -> int:
    """Return the most bytes of host memory that all guests of one trial, with their processes, can
    use at once."""
    # An embedded guest under `none` keeps each page that it has touched resident, and each
    # allocation may touch other pages. So the sum of all allocations counts, up to the guest's
    # memory. For a real guest, all of its memory counts.
    guests = [(_guest_bytes(spec, one), one.count) for one in spec.classes]
    per_host = sum(guest_bytes * count for guest_bytes, count in guests)
    if spec.hosts.memory_bytes is not None:
        # A host's part of a trial ends when its guests use more than its budget. Where no cgroup
        # stops them, they go on until a sample shows that: the size of one guest is added for it.
        largest = max((guest_bytes for guest_bytes, _ in guests), default=0)
        per_host = min(per_host, spec.hosts.memory_bytes + largest)
    return per_host * spec.hosts.number


def _guest_bytes(spec: Spec, one: GuestClass) -> int:
    if spec.driver is Driver.LIBVIRT:
        return one.memory_bytes + _QEMU_PROCESS_BYTES
    touched = total_allocated_bytes(steps_of(spec, one), one.memory_bytes)
    return min(touched, one.memory_bytes) + _EMBEDDED_PROCESS_BYTES
