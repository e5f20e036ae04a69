"""Every file of the two daemons logs, or is listed here with the reason why it does not."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]

SILENT = {
    "pure: takes values and returns values, and its caller logs what follows": (
        "host_agent/api/resident_parts.py",
        "host_agent/api/steps.py",
        "host_agent/door/protocol.py",
        "host_agent/guests/attached/obstacles.py",
        "guest_agent/hinting.py",
        "guest_agent/holding_back.py",
        "guest_agent/resting.py",
        "guest_agent/stream_end.py",
        "guest_agent/telemetry.py",
        "guest_agent/tracking.py",
        "host_agent/guests/agent_settings.py",
        "host_agent/guests/balloon.py",
        "host_agent/guests/libvirt/dimm_xml.py",
        "host_agent/guests/libvirt/domain_xml.py",
        "host_agent/memory/audit_pace.py",
        "host_agent/memory/ledger.py",
        "host_agent/memory/page_map.py",
        "host_agent/pressure/policy.py",
        "host_agent/session/gate.py",
        "host_agent/session/messages.py",
        "host_agent/session/rate_limits.py",
        "host_agent/session/validation.py",
    ),
    "raises, and its caller logs or ends the program: guest.py, registry.py, __main__.py": (
        "guest_agent/config.py",
        "guest_agent/isolation/hugetlb_pool.py",
        "guest_agent/isolation/kmod.py",
        "guest_agent/memory/blocks.py",
        "guest_agent/memory/kernel.py",
        "guest_agent/procfs.py",
        "guest_agent/workload/file_cache.py",
        "guest_agent/workload/holding.py",
        "guest_agent/workload/loops.py",
        "guest_agent/workload/memory.py",
        "guest_agent/workload/programs.py",
        "guest_agent/workload/workload.py",
        "host_agent/api/attaching.py",
        "host_agent/budget/*.py",
        "host_agent/guests/attached/*.py",
        "host_agent/guests/balloon_loop.py",
        "host_agent/guests/libvirt/api.py",
        "host_agent/guests/libvirt/dimms.py",
        "host_agent/guests/libvirt/domain_*.py",
        "host_agent/guests/libvirt/devices.py",
        "host_agent/guests/libvirt/driver.py",
        "host_agent/guests/libvirt/image.py",
        "host_agent/guests/libvirt/kvm_probe.py",
        "host_agent/guests/libvirt/qemu_*.py",
        "host_agent/guests/libvirt/runtime_dir.py",
        "host_agent/memory/cache_count.py",
        "host_agent/memory/fence.py",
        "host_agent/memory/punch.py",
        "host_agent/memory/ram.py",
        "host_agent/memory/reclaim.py",
        "host_agent/persistence/database.py",
        "host_agent/repeated_commands.py",
        "host_agent/session/guest_address.py",
    ),
    "tells a callback of its owner, which logs: the guest's `lost`, the tasks' `failed`": (
        "host_agent/guests/embedded.py",
        "host_agent/guests/guest_log.py",
        "host_agent/guests/peer.py",
        "host_agent/memory/guest_memory.py",
        "host_agent/session/pending_streams.py",
        "host_agent/session/requests.py",
        "host_agent/session/stream.py",
    ),
    "runs ten times a second or more, and its figures are in samples and metrics": (
        "guest_agent/isolation/embedded.py",
        "guest_agent/memory/buddy.py",
        "host_agent/api/metrics.py",
        "host_agent/api/sampling.py",
        "host_agent/auditor.py",
        "host_agent/audits.py",
        "host_agent/cpu_meter.py",
        "host_agent/guests/process_memory.py",
        "host_agent/pressure/loop.py",
    ),
    "answers on stdout": ("host_agent/doctor.py", "host_agent/leaks.py"),
    "sets up the process, before or without logs": (
        "guest_agent/__main__.py",
        "host_agent/threads.py",
        "host_agent/waking.py",
    ),
    "only an interface": (
        "guest_agent/isolation/isolator.py",
        "guest_agent/workload/source.py",
        "host_agent/guests/driver.py",
        "*/__init__.py",
    ),
}


def silent_files() -> Iterator[str]:
    for package in ("guest_agent", "host_agent"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_log = logging.getLogger(" not in path.read_text():
                yield str(path.relative_to(ROOT))


def test_every_file_of_a_daemon_logs_or_has_a_reason_not_to() -> None:
    patterns = [pattern for group in SILENT.values() for pattern in group]
    silent = list(silent_files())
    without_reason = [f for f in silent if not any(fnmatch(f, p) for p in patterns)]
    assert not without_reason, "have them log, or say here why they do not"
    needless = [p for p in patterns if not any(fnmatch(f, p) for f in silent)]
    assert not needless, "they log, or are gone"
