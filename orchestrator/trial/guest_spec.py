"""Makes the spec of each guest of a trial, from which a host agent creates the guest. Pure."""

from __future__ import annotations

from hintfleet.errors import InvalidInput
from hintfleet.settings import Driver, Method, hinting_parts
from hintfleet.v1 import host_pb2
from orchestrator.spec.arms import Arm
from orchestrator.spec.workload import programs
from orchestrator.trial.plan import GuestTask, HostTask


def guest_spec(task: HostTask, guest: GuestTask) -> host_pb2.GuestSpec:
    """Return the spec from which the host agent creates a guest of a trial.

    :raises InvalidInput: the driver has no pair of the arm's tracker and isolator.
    """
    arm, driver = task.trial.arm, task.spec.driver
    return host_pb2.GuestSpec(
        driver=driver_pb2(driver),
        memory_bytes=guest.kind.memory_bytes,
        method=host_pb2.Method.Value(arm.method.name),
        hinting=_hinting_settings(driver, arm) if arm.method is Method.HINTING else None,
        balloon=_balloon_settings(arm) if arm.method is Method.BALLOON else None,
        kernel_parameters=arm.kernel_parameters,
        programs=programs(guest.kind.workload) if guest.kind.workload else (),
        image=guest.kind.image,
        zram_bytes=arm.swap.zram_bytes if arm.swap else 0,
    )


def _hinting_settings(driver: Driver, arm: Arm) -> host_pb2.HintingSettings:
    parts = hinting_parts(driver, arm.isolator, arm.tracker)
    if parts is None:
        raise InvalidInput(f"arm {arm.name}: the {driver} driver has no such tracker and isolator")
    return host_pb2.HintingSettings(
        isolator=parts.isolator,
        tracker=parts.tracker,
        chunk_order=arm.chunk_order,
        policy=arm.policy,
        report_period_ms=round(arm.report_period_s * 1000),
        threshold_chunks=arm.threshold_chunks,
        break_even_ms=round(arm.break_even_s * 1000),
        cold_after_ms=round(arm.cold_after_s * 1000),
        pressure_percent=arm.pressure_above_percent,
    )


def _balloon_settings(arm: Arm) -> host_pb2.BalloonSettings:
    return host_pb2.BalloonSettings(
        reserve_percent=arm.reserve_percent, step_percent=arm.step_percent
    )


def driver_pb2(driver: Driver) -> host_pb2.Driver.ValueType:
    """Return a driver as a value of the control API's enum."""
    return host_pb2.EMBEDDED if driver is Driver.EMBEDDED else host_pb2.LIBVIRT
