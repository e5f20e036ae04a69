"""What is deployed. The systemd units let libvirt and the guest agent's mounts live, and start
failed agents again, unless their settings are wrong. The kernel module leaves the workqueue and the
default order to the kernel. deploy/system/install tells what it installs, or what is missing if it
is not run by root. deploy/start-libvirt starts libvirtd beside a virtlogd that runs."""

import configparser
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hintfleet.errors import ExitCode

ROOT = Path(__file__).parents[2]

# systemd.exec(5): each of these gives the service a mount namespace of its own, whose mounts end
# with the service.
MOUNT_NAMESPACE = (
    *("ProtectSystem", "ProtectHome", "ProtectKernelTunables", "ProtectKernelModules"),
    *("ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset", "PrivateTmp"),
    *("PrivateDevices", "PrivateMounts", "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths"),
    *("TemporaryFileSystem", "BindPaths", "BindReadOnlyPaths", "RootDirectory", "MountFlags"),
)


@pytest.mark.parametrize("option", MOUNT_NAMESPACE)
def test_the_guest_agents_mounts_outlive_it(option: str) -> None:
    """The agent's hugetlbfs holds the reservations of isolated chunks. If it were unmounted at the
    death of the agent, others could use chunks that the host may still drop (I4)."""
    unit = (ROOT / "deploy/systemd/hintfleet-guest.service").read_text()
    assert not any(line.startswith(f"{option}=") for line in unit.splitlines())


def test_the_host_agent_stops_no_daemon_of_libvirt() -> None:
    """libvirtd and virtqemud conflict: a unit that pulls in one of them stops the other one, and
    with it every connection to libvirt."""
    unit = (ROOT / "deploy/systemd/hintfleet-host.service").read_text()
    settings = [line.partition("=") for line in unit.splitlines() if not line.startswith("#")]
    about_libvirt = {name: value for name, _, value in settings if "virt" in value}
    assert about_libvirt.keys() == {"After", "Documentation"}
    assert {"libvirtd.socket", "virtqemud.socket"} <= set(about_libvirt["After"].split())


def test_the_kernel_module_lets_the_kernel_choose_the_workqueue_of_its_passes() -> None:
    """If module and kernel queued the kernel's work item on two workqueues, two passes could run at
    once. The second one's batch would replace the first one's, whose chunks would go back to the
    guest while the host may still drop them (I1)."""
    source = (ROOT / "deploy/kmod/hintfleet_kmod.c").read_text()
    code = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    assert "mod_delayed_work(reporting.work.wq, &reporting.work, 0)" in code
    assert not re.findall(r"\w+_wq\b|\b(?:queue|schedule)_(?:delayed_)?work\w*", code)


def test_the_kernel_module_asks_for_the_default_order_by_name() -> None:
    """Where the kernel has a name for its default order, 0 is an order, too: every free page would
    be reported, and no page is a chunk."""
    source = (ROOT / "deploy/kmod/hintfleet_kmod.c").read_text()
    assert "#ifdef PAGE_REPORTING_ORDER_UNSPECIFIED\n\t.order =" in source


def unit_of(agent: str) -> configparser.ConfigParser:
    """Read an agent's systemd unit; of a setting that is there twice, the last one."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(ROOT / f"deploy/systemd/hintfleet-{agent}.service")
    return unit


@pytest.mark.parametrize(("agent", "pause"), [("host", "1s"), ("guest", "300ms")])
def test_an_agent_is_started_until_it_works_unless_its_settings_are_wrong(
    agent: str, pause: str
) -> None:
    """Guests that were made end by themselves if they have no host agent for a minute."""
    unit = unit_of(agent)
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Service"]["RestartSec"] == pause
    assert unit["Service"]["RestartPreventExitStatus"] == str(ExitCode.USAGE.value)


@pytest.mark.parametrize(
    ("status", "is_delayed"), [("1", True), ("0", False), ("2", False), ("KILL", False)]
)
def test_a_guest_agent_that_fails_is_not_started_again_at_once(
    tmp_path: Path, status: str, is_delayed: bool
) -> None:
    """A killed one is: the memory that it had isolated is missing in the guest."""
    fake(tmp_path, {"sleep": f"touch {tmp_path}/slept"})
    # systemd.service(5): "$$" stands for "$".
    command = unit_of("guest")["Service"]["ExecStopPost"].replace("$$", "$")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EXIT_STATUS": status}
    # If the command failed, the unit would count as failed after a clean stop, too.
    subprocess.run(shlex.split(command), env=environment, check=True)
    assert (tmp_path / "slept").exists() == is_delayed


def fake(folder: Path, commands: dict[str, str]) -> None:
    """Make these commands in a folder; each runs its line of shell."""
    for name, does in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this tree, with the commands in a folder before those of the system."""
    return subprocess.run(
        [ROOT / script],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def install(folder: Path, user: int) -> list[str]:
    """Run deploy/system/install as if this user ran it and no package were installed. Return its
    lines on stderr; the fake apt-get adds a line `RUN ...` for each of its calls."""
    fake(
        folder,
        {"id": f"echo {user}", "dpkg-query": "exit 1", "apt-get": 'echo "RUN $0 $*" >&2'},
    )
    done = run(folder, "deploy/system/install")
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_root_is_told_what_is_installed_before_it_is(tmp_path: Path) -> None:
    said = install(tmp_path, user=0)
    (first,) = (n for n, line in enumerate(said) if line.endswith("apt-get update -qq"))
    told = "\n".join(said[:first])
    assert "qemu-system-x86 " in told
    assert "apt-get install" in told
    assert "make test VM=no" in told
    assert said[first + 1].startswith(f"RUN {tmp_path}/apt-get install --no-install-recommends")


def test_others_are_told_what_is_missing(tmp_path: Path) -> None:
    said = install(tmp_path, user=1000)
    assert "not root, so not installed: qemu-system-x86 " in said[0]
    assert not any(line.startswith("RUN") for line in said)


@pytest.mark.parametrize(("pidof", "is_started"), [("exit 0", True), ("exit 1", False)])
def test_libvirtd_is_started_beside_a_virtlogd_that_runs(
    tmp_path: Path, pidof: str, is_started: bool
) -> None:
    started = tmp_path / "started"
    commands = {
        "virsh": f"test -e {started}",
        "getent": "exit 2",  # no group kvm: the real /dev/kvm is not changed
        "virtlogd": "echo 'virtlogd: error: Unable to obtain pidfile' >&2; exit 1",
        "pidof": pidof,
        "libvirtd": f"touch {started}",
        "sleep": "exit 0",
    }
    fake(tmp_path, commands)
    done = run(tmp_path, "deploy/start-libvirt")
    assert (done.returncode == 0) == started.exists() == is_started
    assert "Unable to obtain pidfile" in done.stderr
