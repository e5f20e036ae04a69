"""Checks whether a spec's driver, method and settings for a guest's agent are known. Makes the
agent's configuration, except what only the embedded driver adds to it (the RAM)."""

from __future__ import annotations

from collections.abc import Iterable

from hintfleet.agent_config import AgentConfig, Memory
from hintfleet.errors import Refused
from hintfleet.settings import (
    DEFAULT_CHUNK_ORDER,
    DEFAULT_THRESHOLD_CHUNKS,
    HUGE_PAGE_ORDER,
    PARTS,
    Driver,
    HintingParts,
    IsolatorKind,
    Method,
    hinting_parts,
)
from hintfleet.v1 import host_pb2
from host_agent.guests.driver import GuestRequest, Survival

_GUEST_TLS_FOLDER = "/etc/hintfleet/tls"

_A_GUEST = {Driver.EMBEDDED: "an embedded guest", Driver.LIBVIRT: "a libvirt guest"}


def check_known(name: str, spec: host_pb2.GuestSpec) -> None:
    """Check that this host agent knows the driver and the method of a guest.

    :raises Refused: it does not; for example, they are of a later version.
    """
    for what, kinds, value in (
        ("driver", host_pb2.Driver, spec.driver),
        ("method", host_pb2.Method, spec.method),
    ):
        if value not in kinds.values():
            raise Refused(
                f"guest {name}: this host agent has no {what} number {value}",
                hint="all programs must be of one version",
            )


def check_hinting(driver: Driver, asked: host_pb2.HintingSettings) -> HintingParts:
    """Return the isolator and the tracker of a guest with these settings.

    :raises Refused: the driver has no such isolator or tracker, or the two do not fit together or
        to the chunk order. The hint says what is possible.
    """
    isolators, trackers = zip(*PARTS[driver], strict=True)
    for what, value, there in (
        ("isolator", asked.isolator, isolators),
        ("tracker", asked.tracker, trackers),
    ):
        if value and value not in there:
            raise _has_no(_A_GUEST[driver], what, value, there)
    parts = hinting_parts(driver, asked.isolator, asked.tracker)
    if parts is None:
        its_own = [pair.tracker for pair in PARTS[driver] if pair.isolator == asked.isolator]
        raise _has_no(f"isolator {asked.isolator}", "tracker", asked.tracker, its_own)
    if parts.isolator is IsolatorKind.HUGETLB and asked.chunk_order not in (0, HUGE_PAGE_ORDER):
        raise Refused(
            f"isolator hugetlb moves chunks of order {HUGE_PAGE_ORDER} only", hint="isolator: kmod"
        )
    return parts


def agent_config(
    driver: Driver,
    request: GuestRequest,
    server: str,
    survival: Survival | None,
    *,
    tls: bool = False,
) -> AgentConfig:
    """Return an agent's configuration. For an embedded guest its driver adds the RAM later.

    :param server: address at which the guest finds the host agent.
    :param tls: whether the guest must use TLS; its certificate must be in the guest already, in
        /etc/hintfleet/tls.
    :raises Refused: as `check_hinting`.
    :raises InvalidInput: a setting is out of its bounds.
    """
    spec, hinting = request.spec, request.spec.hinting
    parts = check_hinting(driver, hinting)
    return AgentConfig(
        server=server,
        guest_uuid=request.uuid,
        token=request.token,
        # Under methods reporting and balloon, as under none, a guest only runs the workload.
        method=Method.HINTING if spec.method == host_pb2.HINTING else Method.NONE,
        isolator=parts.isolator,
        tracker=parts.tracker,
        chunk_order=hinting.chunk_order or DEFAULT_CHUNK_ORDER,
        threshold_chunks=hinting.threshold_chunks or DEFAULT_THRESHOLD_CHUNKS,
        memory=Memory.EMBEDDED if driver is Driver.EMBEDDED else Memory.KERNEL,
        max_memory_bytes=spec.max_memory_bytes,
        # `programs` is empty for an embedded guest, which runs none, and for an attached one: only
        # its owner may allow programs, in the configuration file in the guest.
        programs=tuple(spec.programs) if spec.driver == host_pb2.LIBVIRT else (),
        tls_folder=_GUEST_TLS_FOLDER if tls else "",
        # `orphan_after_s` 0 means never: without Survival, a guest ends with the host agent in any
        # case, and the agent of an attached guest waits for a host agent without limit.
        orphan_after_s=survival.orphan_after_s if survival else 0,
    )


def _has_no(who: str, what: str, asked: str, there: Iterable[str]) -> Refused:
    return Refused(
        f"{who} has no {what} {asked!r}", hint=f"{what}: {' or '.join(dict.fromkeys(there))}"
    )
