"""Running an experiment: plan, fleet, store and view, brought together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ulid import ULID

from orchestrator import fleet_ray
from orchestrator.host_process import LogicalHost
from orchestrator.host_session import HostPlace
from orchestrator.machine import environment, meminfo_bytes
from orchestrator.plan import Trial, host_names, host_task, plan_trials
from orchestrator.records import Record
from orchestrator.spec import Spec, describe
from orchestrator.spec_checks import machine_problem
from orchestrator.spec_file import LoadedSpec
from orchestrator.store.reader import Store
from orchestrator.store.writer import RunHeader, RunWriter


class View(Protocol):
    """Shows a run while it runs."""

    def starting(self, header: RunHeader, trials: tuple[Trial, ...]) -> None:
        """The hosts are being started."""

    def trial_started(self, trial: Trial) -> None:
        """This trial runs now."""

    def record(self, record: Record) -> None:
        """Something happened in it."""

    def trial_ended(self, trial: Trial, undecided: str) -> None:
        """It is over; `undecided` says why it counts for nothing, if it does not."""


def run_experiment(loaded: LoadedSpec, store: Store, view: View, libvirt_uri: str = "") -> str:
    """Run all trials of a spec; returns the run's id.

    :raises InvalidInput: the machine has not the memory. Nothing was started then.
    :raises HintfleetError: a host cannot be reached or used, or results cannot be
        stored. The run is stored as failed if it had begun; all guests and processes
        are gone.
    """
    spec = loaded.spec
    if problem := machine_problem(spec, meminfo_bytes("MemAvailable")):
        raise loaded.error([problem])
    header = RunHeader(
        run_id=str(ULID()).lower(),
        spec=spec,
        spec_text=loaded.document.text,
        summary=describe(spec),
        environment=environment(),
    )
    trials = plan_trials(spec, header.run_id)
    view.starting(header, trials)
    # The run is stored before the fleet is ended: that takes its time.
    with (
        fleet_ray.Fleet(_places(spec, libvirt_uri)) as fleet,
        RunWriter(store, header) as writer,
    ):
        for trial in trials:
            _run_trial(spec, trial, fleet, writer, view)
    return header.run_id


def _run_trial(
    spec: Spec, trial: Trial, fleet: fleet_ray.Fleet, writer: RunWriter, view: View
) -> None:
    tasks = {host: host_task(spec, trial, host) for host in host_names(spec)}
    writer.begin_trial(trial, tasks)
    view.trial_started(trial)
    for record in fleet.run_trial(tasks):
        writer.append(record)
        view.record(record)
    view.trial_ended(trial, writer.end_trial())


def _places(spec: Spec, libvirt_uri: str) -> Mapping[str, HostPlace]:
    return {
        name: HostPlace(
            name=name,
            driver=spec.driver,
            memory_needed_bytes=spec.guests.memory_bytes,
            timeouts=spec.timeouts,
            logical=_logical(spec, name, libvirt_uri),
            address=spec.hosts.agents[i] if spec.hosts.agents else "",
        )
        for i, name in enumerate(host_names(spec))
    }


def _logical(spec: Spec, name: str, libvirt_uri: str) -> LogicalHost | None:
    if spec.hosts.memory_bytes is None:
        return None
    return LogicalHost(
        name=name,
        memory_budget_bytes=spec.hosts.memory_bytes,
        libvirt_uri=libvirt_uri,
        start_timeout_s=spec.timeouts.connect_s,
    )


def overrides(driver: str | None, agents: tuple[str, ...]) -> dict[str, object]:
    """What the command line replaces in a spec."""
    found: dict[str, object] = {}
    if driver:
        found["driver"] = driver
    if agents:
        found["hosts"] = {"agents": agents}
    return found
