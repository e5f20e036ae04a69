"""What the packaging promises the code."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# systemd.exec(5): each of these sets up a mount namespace.
MOUNT_NAMESPACE = (
    *("ProtectSystem", "ProtectHome", "ProtectKernelTunables", "ProtectKernelModules"),
    *("ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset", "PrivateTmp"),
    *("PrivateDevices", "PrivateMounts", "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths"),
    *("TemporaryFileSystem", "BindPaths", "BindReadOnlyPaths", "RootDirectory", "MountFlags"),
)


@pytest.mark.parametrize("option", MOUNT_NAMESPACE)
def test_the_guest_agents_mounts_outlive_it(option: str) -> None:
    """Its hugetlbfs holds the reservations of what is isolated: unmounted with a dead agent,
    it would let others use chunks that the host may still drop (I4)."""
    unit = (ROOT / "deploy/systemd/hintfleet-guest.service").read_text()
    assert not any(line.startswith(f"{option}=") for line in unit.splitlines())
