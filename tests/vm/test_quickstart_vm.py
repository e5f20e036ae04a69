"""`hintfleet run` on real guests: with hinting, freed memory comes back to the host; no guest,
process or temporary file is left."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hintfleet.units import MIB
from host_agent.guests.libvirt.image import GuestImage
from tests.support.agents import wait_until
from tests.support.lab import RUN_TIMEOUT_S, Lab, made_lab, result

libvirt = pytest.importorskip("libvirt")

CATALOGUE = Path(__file__).parents[2] / "orchestrator/spec/catalogue/quickstart-vm.yaml"
# With a Settle after the workload has freed memory: here we only test that this memory comes back.
# How soon it does is measured in tests/bench.
SPEC = re.sub(r"free: (.*)}", r"free: \1, settle: true}", CATALOGUE.read_text())


@pytest.fixture
def lab(tmp_path: Path, libvirt_uri: str, image: GuestImage) -> Iterator[Lab]:
    with made_lab(tmp_path) as made:
        made.temporary.chmod(0o711)  # QEMU's user must be able to enter this folder
        yield made


def domains(uri: str) -> list[str]:
    connection = libvirt.open(uri)
    try:
        return [
            d.name() for d in connection.listAllDomains() if d.name().startswith("hintfleet-host")
        ]
    finally:
        connection.close()


def host_huge_pages() -> str:
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    return next(line for line in meminfo if line.startswith("HugePages_Total"))


def test_what_guests_free_leaves_the_host(lab: Lab, libvirt_uri: str) -> None:
    huge_before = host_huge_pages()
    data = result(lab.run("run", lab.spec(SPEC), "-o", "json"))
    arms = {arm["arm"]: arm["footprint"] for arm in data["arms"]}
    assert arms["kmod"]["returned"]["after_s"] == 3
    assert arms["kmod"]["returned"]["freed_bytes"] == 2 * 2 * 384 * MIB
    assert arms["kmod"]["reclaimed_now_bytes"] >= 0.9 * 2 * 384 * MIB
    assert arms["none"]["reclaimed_now_bytes"] == 0
    assert arms["none"]["returned"]["share"] < 0.1
    for footprint in arms.values():
        assert footprint["wrong_pages"] == 0
        assert footprint["verified_pages"] >= 2 * 512 * 256  # two guests read back 512 MiB each
    hypervisor = data["environment"]["hypervisor"]
    assert re.fullmatch(r"libvirt [\d.]+, QEMU [\d.]+, (KVM|TCG)", hypervisor)
    assert domains(libvirt_uri) == []
    assert host_huge_pages() == huge_before
    lab.check_nothing_is_left()


def test_ctrl_c_leaves_no_guest(lab: Lab, libvirt_uri: str) -> None:
    with lab.started("run", lab.spec(SPEC)) as process:
        wait_until(lambda: len(domains(libvirt_uri)) == 2, "two guests to run")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=RUN_TIMEOUT_S)
        assert process.returncode == 130
    wait_until(lambda: domains(libvirt_uri) == [], "the guests to be gone")
    lab.check_nothing_is_left()


def test_a_missing_libvirt_is_an_error(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///session?socket=/nonexistent")
    done = lab.run("run", lab.spec(SPEC), "-o", "json")
    assert done.returncode == 1
    assert "cannot connect to libvirt" in done.stderr
    assert "try:" in done.stderr
    assert not done.stdout or json.loads(done.stdout)
