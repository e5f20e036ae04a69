"""What a probe of KVM found is used again until the host reboots, or /dev/kvm or the guest's kernel
changes; a no is used for an hour at most."""

import os
import time
from pathlib import Path

import pytest

from host_agent.guests.libvirt import kvm_probe
from host_agent.guests.libvirt.image import GuestImage


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GuestImage:
    monkeypatch.setattr(kvm_probe, "_DEVICE", Path("/dev/null"))  # a device that this user may use
    (tmp_path / "image").mkdir()
    return GuestImage(directory=tmp_path / "image", kernel_release="6.1")


@pytest.mark.parametrize(("boots", "hours_later"), [(True, True), (False, None)])
def test_how_long_a_result_is_used(
    image: GuestImage, boots: bool, hours_later: bool | None
) -> None:
    assert kvm_probe.cached(image) is None
    kvm_probe.remember(image, boots)
    assert kvm_probe.cached(image) is boots
    two_hours_ago_s = time.time() - 2 * 3600
    os.utime(image.directory.parent / "kvm-probe.json", (two_hours_ago_s, two_hours_ago_s))
    assert kvm_probe.cached(image) is hours_later


def test_a_result_of_another_kernel_is_not_used(image: GuestImage) -> None:
    kvm_probe.remember(image, True)
    other = GuestImage(directory=image.directory, kernel_release="6.18")
    assert kvm_probe.cached(other) is None
