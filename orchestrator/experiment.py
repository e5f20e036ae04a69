"""Prepares an experiment and runs its trials: connects the plan, the fleet, the store and the
view."""

from __future__ import annotations

import logging
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ulid import ULID

from hintfleet.errors import InvalidInput, Refused
from hintfleet.logs import fields
from hintfleet.system.machine_limits import available_memory
from orchestrator.cluster.fleet import Fleet
from orchestrator.cluster.ray_cluster import PRIVATE, ClusterAddress
from orchestrator.machine import environment
from orchestrator.results.precision import Look, look
from orchestrator.results.store.lock import busy_error
from orchestrator.results.store.reader import Run, Store, StoredTrial
from orchestrator.results.store.run_spec import read_spec
from orchestrator.results.store.writer import RunHeader, RunWriter, precision_of
from orchestrator.results.trial_outcome import (
    TrialOutcome,
    TrialStatus,
    host_outcome,
    next_attempt,
    trial_outcome,
)
from orchestrator.spec import file as spec_file
from orchestrator.spec.checks import hosts_problem, machine_problem
from orchestrator.spec.file import LoadedSpec
from orchestrator.spec.model import Spec, describe
from orchestrator.trial.host_place import host_places
from orchestrator.trial.plan import HostTask, Trial, host_names, host_tasks, plan_trials, rounds
from orchestrator.trial.records import Event, Record, Samples

_log = logging.getLogger("hintfleet.run")


class View(Protocol):
    """Shows a run while it runs."""

    def starting(
        self, header: RunHeader, trials: tuple[Trial, ...], kept: Mapping[int, TrialStatus]
    ) -> None:
        """Show that the hosts are being started or reached.

        :param kept: the status, by position, of each trial that already has a result and does not
            run.
        """

    def waiting(self, reason: str) -> None:
        """Show why hosts cannot be started yet, or which node of the cluster does not answer."""

    def trial_started(self, trial: Trial) -> None:
        """Show that this trial runs now."""

    def record(self, record: Record) -> None:
        """Show a record of the trial that runs now."""

    def trial_ended(self, trial: Trial, outcome: TrialOutcome) -> None:
        """Show how a trial ended."""

    def looked(self, seen: Look) -> None:
        """Show what a run with a precision saw when it looked whether to go on."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run that is new, or stored and to be resumed.

    :ivar trials: all trials of the plan.
    :ivar to_run: the trials that are left to run, each as its next attempt. A run with a
        precision may end before the last. Empty if it is precise enough already, and no repetition
        that has begun has a trial without a result.
    :ivar begun: how many repetitions have begun.
    :ivar kept: the status, by position, of each trial that already has a result.
    :ivar is_resumed: the run is stored already.
    :ivar is_over: the run has ended and was not cut off, and no trial is left to run.
    """

    loaded: LoadedSpec
    header: RunHeader
    trials: tuple[Trial, ...]
    to_run: tuple[Trial, ...]
    begun: int = 0
    kept: Mapping[int, TrialStatus] = field(default_factory=dict)
    is_resumed: bool = False
    is_over: bool = False


def new_experiment(
    name_or_path: str, overrides: Mapping[str, Any], libvirt_uri: str = ""
) -> Experiment:
    """Return a new run. Stores and starts nothing.

    :param overrides: as the function `overrides` returns them.
    :raises InvalidInput: there is no such spec, or it is not valid.
    """
    loaded = spec_file.load(name_or_path, dict(overrides))
    header = RunHeader(
        # A ULID begins with the time, so folders of samples sort by time. In lower case, because
        # `Store.find_run` converts the name that it looks for to lower case.
        run_id=str(ULID()).lower(),
        spec=loaded.spec,
        spec_text=loaded.document.text,
        summary=describe(loaded.spec),
        environment=environment(),
        overrides=loaded.overrides,
        libvirt_uri=libvirt_uri,
    )
    trials = plan_trials(loaded.spec, header.run_id)
    return Experiment(loaded=loaded, header=header, trials=trials, to_run=trials)


def stored_experiment(store: Store, run: Run, libvirt_uri: str = "") -> Experiment:
    """Return a stored run, to be resumed with its own spec and so with the same seeds.

    :param libvirt_uri: used instead of the stored one, which does not change; empty: the stored one
        is used.
    :raises Refused: another process runs this run now, or this version cannot read the spec, or
        the same text has another meaning in this version.
    """
    if run.state == "running":
        raise busy_error(run.run_id)
    loaded = _spec_of(run)
    header = RunHeader(
        run_id=run.run_id,
        spec=loaded.spec,
        spec_text=run.spec_text,
        summary=run.summary,
        environment=_with_history(run.environment, environment()),
        overrides=run.overrides,
        libvirt_uri=libvirt_uri or run.libvirt_uri,
    )
    trials = plan_trials(loaded.spec, run.run_id)
    attempts = store.trials(run.run_id)
    to_run = left_to_run(trials, attempts, in_pairs=loaded.spec.switchback is not None)
    begun = 1 + max((attempt.repetition for attempt in attempts), default=-1)
    if not rounds(loaded.spec, to_run, begun)[0] and _is_precise(store, run):
        to_run = ()
    again = {trial.position for trial in to_run}
    return Experiment(
        loaded=loaded,
        header=header,
        trials=trials,
        to_run=to_run,
        begun=begun,
        kept={
            attempt.position: attempt.status
            for attempt in attempts
            if attempt.counted and attempt.status.has_result and attempt.position not in again
        },
        is_resumed=True,
        is_over=not to_run and not run.was_cut_off,
    )


def _is_precise(store: Store, run: Run) -> bool:
    return bool(run.precision and look(store.footprint_rows(run.run_id), run.precision).is_enough)


def _spec_of(run: Run) -> LoadedSpec:
    hint = (
        f"start a new run: hintfleet show {run.run_id[-6:]} --spec > again.yaml; "
        f"{shlex.join(('hintfleet', 'run', 'again.yaml', *run.options))}"
    )
    try:
        # The same text with another meaning is refused, too: the trials of both parts of the run
        # would not be comparable.
        return read_spec(run)
    except Refused as error:
        raise Refused(f"run {run.run_id} cannot be resumed; {error.message}", hint=hint) from error


_THEN = ", then "


def _with_history(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of all parts of a run: `6.1, then 6.6` where a value changed."""
    return {**before} | {n: _appended(before.get(n, value), value) for n, value in now.items()}


def _appended(history: str, value: str) -> str:
    # Compare with the whole last value, not the end of the text: "24 GiB" ends with "4 GiB".
    return history if history.split(_THEN)[-1] == value else f"{history}{_THEN}{value}"


def left_to_run(
    trials: Iterable[Trial], attempts: Iterable[StoredTrial], *, in_pairs: bool = False
) -> tuple[Trial, ...]:
    """Return the trials of a stored run that have no result yet, each as its next attempt. Pure.

    Which trials are run again is decided by `trial_outcome.next_attempt`.

    :param in_pairs: of a switchback: if a block has no result, both blocks of its pair are run, so
        that they are beside each other in time.
    """
    last = {stored.position: stored for stored in attempts if stored.counted}

    def following(trial: Trial, again: bool) -> Trial | None:
        if not (stored := last.get(trial.position)):
            return trial
        attempt = replace(trial, attempt=stored.attempt)
        return next_attempt(attempt, TrialStatus.CUT_OFF if again else stored.status)

    trials = list(trials)
    left = [trial for trial in trials if following(trial, again=False)]
    broken = {trial.repetition for trial in left} if in_pairs else set()
    found = (following(trial, again=trial.repetition in broken) for trial in trials)
    return tuple(trial for trial in found if trial)


def run_experiment(
    experiment: Experiment,
    store: Store,
    view: View,
    *,
    address: ClusterAddress = PRIVATE,
    retries: int = 1,
    tls_folder: str = "",
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run the trials that have no result; then run again those that were lost.

    A run with a precision does so in rounds (`plan.rounds`), and ends when it is precise enough.

    :param address: the Ray cluster to run them on.
    :param retries: how often a trial that is lost is run again in this call, at most.
    :param check: called about twice a second or more often while a trial runs, but not while hosts
        are started; an exception that it raises ends the run.
    :raises InvalidInput: this machine alone is to run it and has too little memory, or a host's
        address needs TLS, or the node of a host agent is not certain. No host was started.
    :raises HintfleetError: a host cannot be reached or used, or results cannot be
        stored. If all hosts had been reached once, the run is stored as failed, as far as it can be
        stored. All guests that the run made, and its processes, have ended.
    """
    spec, header = experiment.header.spec, experiment.header
    to_run = experiment.to_run
    if not to_run:
        # The run was cut off when it had no trial left to run. RunWriter stores the end of the run.
        with RunWriter(store, header, resume=True):
            return
    # In a cluster, cluster/placement.py compares the memory of its nodes with what hosts need.
    problem = None if address.value else machine_problem(spec, available_memory())
    if problem := problem or hosts_problem(spec, encrypted=bool(tls_folder)):
        raise experiment.loaded.error([problem])
    fleet = Fleet(
        address,
        host_places(spec, header.libvirt_uri, tls_folder, in_cluster=bool(address.value)),
        libvirt_uri=header.libvirt_uri,
        wait_s=spec.timeouts.nodes_s,
        say=view.waiting,
    )
    view.starting(header, experiment.trials, experiment.kept)
    about = {"run": header.run_id, "spec": spec.name, "hosts": len(host_names(spec))}
    _log.info("run begun", extra=fields(**about, trials=len(to_run), kept=len(experiment.kept)))
    # In this order, RunWriter stores the end of the run before the fleet is closed: closing can
    # take more than a minute, in which this process may be killed.
    with (
        fleet,
        RunWriter(store, header, experiment.is_resumed) as writer,
    ):
        run_rounds(
            rounds(spec, to_run, experiment.begun),
            retries,
            lambda trial: _run_trial(spec, trial, fleet, writer, view, check),
            lambda: _is_enough(header, store, view),
        )


def run_rounds(
    to_run: Iterable[Sequence[Trial]],
    retries: int,
    run_trial: Callable[[Trial], TrialStatus],
    is_enough: Callable[[], bool],
) -> None:
    """Run trials round by round: in each round all trials, then again those that were lost.

    :param to_run: the trials of each round (`plan.rounds`).
    :param retries: how often a trial that is lost is run again, at most.
    :param is_enough: called after each round; if it returns True, no other round is run.
    """
    for trials in to_run:
        for retries_left in range(retries, -1, -1):
            ended = [(trial, run_trial(trial)) for trial in trials]
            following = (next_attempt(trial, status, retries_left) for trial, status in ended)
            trials = [trial for trial in following if trial]
            for trial in trials:
                _log.info("trial will be run again", extra=fields(trial=trial.trial_id))
        if is_enough():
            return


def _is_enough(header: RunHeader, store: Store, view: View) -> bool:
    """If the run has a precision, look at the figures and return whether they are precise enough;
    else return False."""
    precision = precision_of(header.spec)
    if precision is None:
        return False
    seen = look(store.footprint_rows(header.run_id, even_running=True), precision)
    view.looked(seen)
    _log.info(
        "run looked at its intervals",
        extra=fields(run=header.run_id, repetitions=seen.repetitions, enough=seen.is_enough),
    )
    return seen.is_enough


def _run_trial(
    spec: Spec,
    trial: Trial,
    fleet: Fleet,
    writer: RunWriter,
    view: View,
    check: Callable[[], None],
) -> TrialStatus:
    tasks = host_tasks(spec, trial)
    writer.begin_trial(trial, fleet.prepare())
    view.trial_started(trial)
    _log.info("trial begun", extra=fields(trial=trial.trial_id))
    outcome = store_records(writer, tasks, fleet.run_trial(tasks, check), view.record)
    view.trial_ended(trial, outcome)
    _log.log(
        logging.INFO if outcome.status is TrialStatus.DONE else logging.WARNING,
        "trial ended",
        extra=fields(trial=trial.trial_id, status=outcome.status, reason=outcome.reason),
    )
    return outcome.status


def store_records(
    writer: RunWriter,
    tasks: Mapping[str, HostTask],
    batches: Iterable[Sequence[Record]],
    seen: Callable[[Record], None] = lambda _: None,
) -> TrialOutcome:
    """Store the records of the open trial; compute, store and return its outcome.

    :param writer: has an open trial (`begin_trial`).
    :param batches: of records of all hosts; the trial has ended when this iterable ends.
    :param seen: called with each record after `writer.append`. Samples may then be in a buffer,
        and not on disk yet.
    """
    events: defaultdict[str, list[Event]] = defaultdict(list)
    for batch in batches:
        writer.append(batch)
        for record in batch:
            seen(record)
            if not isinstance(record, Samples):
                events[record.host].append(record)
    outcome = trial_outcome(
        [
            host_outcome(tasks[host], events[host], series)
            for host, series in writer.series(list(tasks))
        ]
    )
    writer.end_trial(outcome)
    return outcome


def overrides(
    driver: str | None, agents: Sequence[str], settings: Sequence[str] = ()
) -> dict[str, object]:
    """Return what options of the command line replace in a spec, for `spec.file.load`.

    :param agents: values of --host: an address, or ADDRESS,node=NAME.
    :param settings: values of --set: KEY=VALUE.
    :raises InvalidInput: a setting is not KEY=VALUE.
    """
    keys: dict[str, object] = {}
    if driver:
        keys["driver"] = driver
    if agents:
        keys["hosts"] = {"agents": tuple(map(_agent, agents))}
    if settings:
        keys[spec_file.SET] = dict(map(_setting, settings))
    return keys


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidInput(
            f"--set {text!r} is not KEY=VALUE", hint="for example --set guests.per_host=4"
        )
    return key, value


def _agent(text: str) -> str | dict[str, str]:
    address, node_follows, node = text.rpartition(",node=")
    return {"address": address, "node": node} if node_follows else text
