"""Looks at a node of a Ray cluster, on the node itself.

This module is sent to nodes by value: it must work on a node without hintfleet, or with another
version of it. So until it has found the right versions, it imports only the standard library and
`packaging`, which Ray needs as well. Its functions return plain values only.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

_EXTRAS = ("", "embedded", "orchestrator")


def versions() -> dict[str, str]:
    """Return this node's versions of Python, ray and hintfleet, which must be equal on all nodes;
    empty for what is not installed."""
    return {"Python": platform.python_version()} | {
        name: _version(name) for name in ("ray", "hintfleet")
    }


def look(wanted: dict[str, str], libvirt_uri: str | None) -> dict[str, Any]:
    """Return what this node is.

    The result has `hostname`, `environment` (facts as text, by name; at least those of `versions`)
    and `missing` (packages that hintfleet, if it is installed, needs and that are not installed).
    If the versions are those wanted and nothing is missing, it also has `processors`,
    `memory_bytes`, `available_bytes`, and `libvirt` and `libvirt_usable`, which are empty and None
    if libvirt was not asked.

    :param wanted: as `versions` returns them.
    :param libvirt_uri: ask libvirt at this URI; empty: at the host agent's default; None: do not
        ask.
    """
    found = versions()
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    answer = {
        "hostname": platform.node(),
        "environment": found | {"kernel": kernel},
        "missing": _missing() if found["hintfleet"] else [],
    }
    if found != wanted or answer["missing"]:
        return answer

    from hintfleet.system.machine_limits import available_memory, processors, total_memory
    from orchestrator.doctor import libvirt_guests
    from orchestrator.machine import environment

    usable, detail = (None, "") if libvirt_uri is None else libvirt_guests(libvirt_uri)
    return answer | {
        "environment": environment(),
        "processors": processors().value,
        "memory_bytes": total_memory().value,
        "available_bytes": available_memory().value,
        "libvirt": detail,
        "libvirt_usable": usable,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _missing() -> list[str]:
    """Return the packages that hintfleet needs on a node and that are not installed here."""
    from packaging.requirements import Requirement  # installed: Ray needs it, too

    needed = map(Requirement, metadata.requires("hintfleet") or ())
    names = {
        each.name
        for each in needed
        if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in _EXTRAS)
    }
    return sorted(name for name in names if not _version(name))
