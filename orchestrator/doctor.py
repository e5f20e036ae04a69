"""Checks what this machine can run.

libvirt, the guest image and a hole punch are checked by a host agent (`hintfleet-host --doctor`) in
a process of its own: neither the host agent's modules nor libvirt are imported here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

from hintfleet.errors import HintfleetError, Refused, TransientError
from hintfleet.findings import Finding
from hintfleet.settings import Driver
from hintfleet.system.machine_limits import available_memory, processors, total_memory
from hintfleet.units import format_size
from orchestrator.spec import file as spec_file
from orchestrator.spec.memory_needs import needed_bytes

_HOST_AGENT_TIMEOUT_S = 120
_INSTALL = "pip install 'hintfleet[orchestrator]'"


def examine(libvirt_uri: str = "") -> list[Finding]:
    """Return all findings, in the order in which a new user needs them."""
    return list(_examine(libvirt_uri))


def can_run(findings: list[Finding], driver: Driver) -> bool:
    """Return whether nothing is missing for guests of this driver."""
    return all(finding.ok for finding in findings if finding.needed_by(driver))


def libvirt_guests(libvirt_uri: str) -> tuple[bool, str]:
    """Return whether libvirt guests can run here; and in one line the libvirt and QEMU that they
    would run on, or the first thing that is missing."""
    findings = list(_libvirt(libvirt_uri))
    missing = next((finding for finding in findings if not finding.ok), None)
    if missing is None:
        return True, findings[-1].detail
    return False, f"{missing.name}: {missing.detail.splitlines()[0]}"


def _examine(libvirt_uri: str) -> Iterator[Finding]:
    yield _python()
    yield _memory()
    yield _processors()
    yield _memfd()
    for module in ("ray", "duckdb", "scipy"):
        yield _importable(module, Driver.EMBEDDED, _INSTALL)
    yield from _libvirt(libvirt_uri)


def _libvirt(libvirt_uri: str) -> Iterator[Finding]:
    yield _importable(
        "libvirt",
        Driver.LIBVIRT,
        "apt install python3-libvirt, or apt install libvirt-dev pkg-config gcc python3-dev "
        "and pip install 'hintfleet[host]'",
    )
    yield from _host_agent(libvirt_uri)


def _python() -> Finding:
    return Finding(
        name="Python",
        ok=sys.version_info >= (3, 11),
        detail=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        hint="Python 3.11 or newer, on Linux",
    )


def _memory() -> Finding:
    needed = needed_bytes(spec_file.load("quickstart").spec)
    available, total = available_memory(), total_memory()
    return Finding(
        name="memory",
        ok=available.value >= needed,
        detail=f"{format_size(available.value)} of {format_size(total.value)} available "
        f"{available.where}",
        hint=f"the quickstart needs {format_size(needed)}; end another large program"
        + available.or_raise,
    )


def _processors() -> Finding:
    found = processors()
    return Finding(name="processors", ok=True, detail=f"{found.value:g} {found.where}")


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("hintfleet-doctor"))
    except (AttributeError, OSError) as error:
        return Finding(
            name="memfd", ok=False, detail=str(error), hint="Linux 3.17 or newer with CONFIG_MEMFD"
        )
    return Finding(name="memfd", ok=True, detail="can be made")


def _importable(module: str, needed_for: Driver, hint: str) -> Finding:
    # Looked up, not imported: only the host agent imports libvirt, and importing Ray takes long.
    installed = importlib.util.find_spec(module) is not None
    return Finding(
        name=f"{module} (Python)",
        ok=installed,
        detail="installed" if installed else "not installed",
        hint="" if installed else hint,
        needed_for=needed_for,
    )


def _host_agent(libvirt_uri: str) -> Iterator[Finding]:
    try:
        answer = json.loads(ask_host_agent(libvirt_uri, "--doctor"))
        findings = [Finding.from_json(finding) for finding in answer]
    except HintfleetError as error:
        yield Finding(name="host agent", ok=False, detail=error.message, hint=error.hint)
        return
    except ValueError as error:
        yield Finding(name="host agent", ok=False, detail=str(error))
        return
    yield from findings


def ask_host_agent(libvirt_uri: str, question: str) -> str:
    """Run a host agent (`hintfleet-host`) with the flag `question`; return its stdout.

    :raises Refused: the host agent failed.
    :raises TransientError: the host agent did not end within two minutes.
    """
    command = [sys.executable, "-m", "host_agent", question]
    if libvirt_uri:
        command += ["--libvirt-uri", libvirt_uri]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_HOST_AGENT_TIMEOUT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise Refused(lines[-1], hint="pip install 'hintfleet[host]'") from error
    except subprocess.TimeoutExpired as error:
        raise TransientError(str(error)) from error
    return done.stdout
