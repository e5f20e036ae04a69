"""Domains that a dead host agent left are found and ended; domains of others are not touched."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host_agent.guests.libvirt.runtime_dir import RuntimeDir
from tests.support.agents import HANG_S, wait_until


def start_domain(connection: Any, name: str, console: Path | None) -> None:
    """Start a domain that idles in its firmware, and that libvirt keeps when `connection` ends."""
    serial = f"<serial type='file'><source path='{console}'/></serial>" if console else ""
    connection.createXML(
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<devices>{serial}<memballoon model='none'/></devices></domain>"
    )


@pytest.fixture
def dead_folder() -> Iterator[Path]:
    """Make a folder like that of a guest whose host agent has ended: its name has the id of a
    process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o711)
        folder = Path(base) / f"hintfleet-guest-{ended.pid}-abcdefgh"
        folder.mkdir()
        folder.chmod(0o711)
        yield folder


def host_agent(flag: str, uri: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "host_agent", flag, "--libvirt-uri", uri],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=True,
    )
    said = json.loads(done.stdout)
    assert said["not_looked_at"] == []
    return {leak["where"]: leak for leak in said["leaks"] if leak["what"] == "domain"}


def test_a_domain_without_host_agent(connection: Any, libvirt_uri: str, dead_folder: Path) -> None:
    owned = RuntimeDir.make()
    consoles = {
        "hintfleet-leak-lost": dead_folder / "console.log",
        "hintfleet-leak-owned": owned.console,
        "hintfleet-leak-theirs": None,
        "leak-foreign": dead_folder / "other.log",
    }
    others = set(consoles) - {"hintfleet-leak-lost"}

    def running() -> set[str]:
        return {domain.name() for domain in connection.listAllDomains()} & set(consoles)

    try:
        for name, console in consoles.items():
            start_domain(connection, name, console)
        found = host_agent("--leaks", libvirt_uri)
        assert set(consoles) & set(found) == {"hintfleet-leak-lost"}
        assert found["hintfleet-leak-lost"]["size_bytes"] > 0
        assert found["hintfleet-leak-lost"]["since_unix_s"] > 0
        assert host_agent("--clean", libvirt_uri)["hintfleet-leak-lost"]["removed"]
        wait_until(lambda: running() == others, "the leaked domain to end, and no other")
        assert set(consoles) & set(host_agent("--leaks", libvirt_uri)) == set()
    finally:
        for name in running():
            with contextlib.suppress(Exception):
                connection.lookupByName(name).destroy()
        owned.remove()
