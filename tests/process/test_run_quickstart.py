"""Small runs of the command line with real host agents, guests, gRPC, memfds and Ray: runs that
succeed, and runs that are interrupted, killed, or lose a guest. Also what `show`, `savings`, `runs`
and `serve` tell about them."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from hintfleet.units import MIB
from tests.support.agents import HANG_S, HostAgent, wait_until
from tests.support.lab import RUN_TIMEOUT_S, Lab, made_lab, on_this_machine, result, wait_for_line

SPEC = """\
name: tiny
driver: embedded
hosts: {count: 2, memory: 256MiB}
guests: {per_host: 2, memory: 64MiB}
workload:
  phases:
    - {allocate: 40MiB, for: 300ms}
    - {free: 75%, for: 600ms, settle: true}
arms:
  - {name: none, method: none}
  - {name: bitmap, method: hinting, tracker: bitmap, report_period: 50ms}
repetitions: 2
seed: 1
sample_period: 50ms
"""


def spec(**changed: str) -> str:
    """Return SPEC with other values for some keys, wherever they occur in it."""
    text = SPEC
    for key, value in changed.items():
        text = re.sub(rf"\b{key}: [^,}}\n]+", f"{key}: {value}", text)
    return text


def arms(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["arm"]: arm for arm in data["arms"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, dict[str, Any]]]:
    with made_lab(tmp_path_factory.mktemp("finished")) as lab:
        with on_this_machine():
            done = lab.run("run", lab.spec(SPEC), "-o", "json")
            wait_until(lambda: not lab.processes(), "the end of the run")
        assert f"stored in {lab.folder}" in done.stderr
        assert "next: hintfleet show" in done.stderr
        yield lab, result(done)


def test_memory_comes_back_and_nothing_is_left(finished: tuple[Lab, dict[str, Any]]) -> None:
    lab, data = finished
    assert data["state"] == "done"
    none, bitmap = arms(data)["none"], arms(data)["bitmap"]
    for arm in (none, bitmap):
        used = arm["footprint"]
        assert used["provisioned_bytes"] == 4 * 64 * MIB
        assert 4 * 40 * MIB <= used["peak_resident_bytes"] < 4 * 44 * MIB
        # A page is verified once: before it is freed, or at the end of the trial.
        assert used["verified_pages"] == 2 * 4 * 40 * MIB // 4096
        assert used["wrong_pages"] == 0
        assert used["returned"]["freed_bytes"] == 2 * 4 * 30 * MIB
    assert none["saved_bytes"] is None
    assert none["footprint"]["returned"]["share"] < 0.05
    assert bitmap["footprint"]["reclaimed_now_bytes"] >= 4 * 30 * MIB * 0.9
    assert bitmap["saved_bytes"]["pairs"] == 2, "two repetitions, whatever the hosts"
    assert bitmap["saved_bytes"]["mean"] > 20 * MIB  # not "low": two pairs give a wide interval
    lab.check_nothing_is_left()


def test_show_and_savings_say_the_same(finished: tuple[Lab, dict[str, Any]]) -> None:
    lab, data = finished
    assert result(lab.run("show", data["run_id"][-8:], "-o", "json")) == data
    shown = lab.run("show", "latest").stdout
    assert "bitmap" in shown
    assert "yes, 320 MiB" in shown
    cost = arms(data)["bitmap"]["cost"]
    assert cost["settle_s"] >= 0
    assert cost["asked_settle_s"] >= 0
    assert 1 < cost["wire_bytes_per_range"] < 8
    assert cost["slowdown_percent"]["pairs"] == 2
    assert cost["host_cpu_s"]["pairs"] == 2
    assert arms(data)["none"]["cost"] is None
    rows = json.loads(lab.run("savings", "--run", "latest", "-o", "json").stdout)
    assert [row["saved_bytes"] for row in rows] == [arm["saved_bytes"] for arm in data["arms"]]
    guests = json.loads(lab.run("savings", "--by", "guest", "-o", "json").stdout)
    assert {row["key"] for row in guests} == {f"host{h}-guest{g}" for h in (1, 2) for g in (1, 2)}
    runs = json.loads(lab.run("runs", "-o", "json").stdout)
    assert [run["run_id"] for run in runs] == [data["run_id"]]


def test_the_service_answers_any_client_with_reflection(
    finished: tuple[Lab, dict[str, Any]],
) -> None:
    lab, data = finished
    address = f"unix:{lab.folder}/fleet.sock"
    with lab.started("serve", "--listen", address) as server:
        assert server.stderr is not None
        assert server.stderr.readline() == f"serving on {address}\n"
        for by in ("fleet", "host", "guest", "arm"):
            here = json.loads(lab.run("savings", "--by", by, "-o", "json").stdout)
            there = lab.run("savings", "--by", by, "--server", address, "-o", "json")
            assert json.loads(there.stdout) == here
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="hintfleet.v1.FleetService"), timeout=HANG_S
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            answer = ask_by_reflection(channel)
            assert [run.run_id for run in answer.runs] == [data["run_id"]]
        bad = lab.run("savings", "--run", "nothing", "--server", address)
        assert bad.returncode == 2
        assert "no run 'nothing'" in bad.stderr
        server.send_signal(signal.SIGTERM)
        assert server.wait(HANG_S) == 0


def ask_by_reflection(channel: grpc.Channel) -> Any:
    """Call ListRuns without our stubs, with the description that the server's reflection gives."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName("hintfleet.v1.FleetService").FindMethodByName("ListRuns")
    request, response = map(
        message_factory.GetMessageClass, (method.input_type, method.output_type)
    )
    call = channel.unary_unary(
        "/hintfleet.v1.FleetService/ListRuns",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
    return call(request(limit=5), timeout=HANG_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_but_its_results(
    lab: Lab, number: signal.Signals
) -> None:
    with lab.started("run", lab.spec(spec(count="1"))) as process:
        wait_for_line(process, "trial 2 ")
        wait_until(lambda: len(lab.agents("guest_agent")) == 2, "two guests")
        process.send_signal(number)
        out, err = process.communicate(timeout=HANG_S)
        assert process.returncode == 130
        assert out == ""
        assert "to resume: hintfleet run --resume" in err
        lab.check_nothing_is_left()
    run = json.loads(lab.run("runs", "-o", "json").stdout)[0]
    assert run["state"] == "interrupted"
    shown = json.loads(lab.run("show", "-o", "json").stdout)
    assert shown["trials"][0]["ended_unix_us"] > 0


_UNHEARD = """
import sys
from pathlib import Path
from orchestrator.experiment import new_experiment, run_experiment
from orchestrator.results.store.reader import Store
from orchestrator.view.live import PlainView
from rich.console import Console

class View(PlainView):
    heard = 0
    def record(self, record):
        self.heard = 0

view = View(Console(stderr=True))
def check():
    view.heard += 1
    if view.heard > 3:
        sys.exit("asked, though no record came")

with Store(Path(sys.argv[2])) as store:
    run_experiment(new_experiment(sys.argv[1], {}), store, view, check=check)
"""


def test_a_run_can_be_interrupted_while_nothing_is_heard_of_its_guests(lab: Lab) -> None:
    # When the guests run, no record comes for up to 10 s. Meanwhile `check`, which raises
    # interrupts, must be called.
    quiet = spec(count="1", sample_period="10s")
    command = [sys.executable, "-c", _UNHEARD, lab.spec(quiet), str(lab.folder)]
    done = subprocess.run(
        command,
        env=lab.environment,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "asked, though no record came" in done.stderr
    lab.check_nothing_is_left()


def test_a_killed_run_leaves_no_agent(lab: Lab) -> None:
    with lab.started("run", lab.spec(SPEC)) as process:
        wait_for_line(process, "trial 1 ")
        wait_until(lambda: len(lab.agents("guest_agent")) == 4, "four guests")
        process.kill()
        process.wait()
        # Wait for agents only: helper processes of Ray stay for up to a minute, while they try to
        # report that Ray has ended.
        wait_until(lambda: not lab.agents("host_agent", "guest_agent"), "the end of all agents")
    run = json.loads(lab.run("runs", "-o", "json").stdout)[0]
    assert (run["state"], run["reason"]) == (
        "interrupted",
        "its process was killed or the machine went down",
    )


def test_a_lost_guest_makes_its_trial_undecided_and_the_run_goes_on(lab: Lab) -> None:
    short = spec(**{"count": "1", "for": "1s", "repetitions": "1"})
    with lab.started("run", lab.spec(short), "-o", "json") as process:
        wait_for_line(process, "trial 1 ")
        wait_until(lambda: len(lab.agents("guest_agent")) == 2, "two guests")
        os.kill(lab.agents("guest_agent")[0], signal.SIGKILL)
        out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 3, err
    data = json.loads(out)
    assert data["state"] == "undecided"
    undecided = [trial["undecided"] != "" for trial in data["trials"]]
    assert undecided == [True, False]
    assert arms(data)["bitmap"]["saved_bytes"] is None
    assert "guest" in data["reason"]
    lab.check_nothing_is_left()


def test_staggered_guests_have_their_peaks_apart(lab: Lab) -> None:
    """With hinting, a guest's memory is back before the next guest needs as much; without, it is
    not."""
    apart = spec(count="1", free="100%").replace("per_host: 2", "per_host: 2, stagger: 4s")
    data = result(lab.run("run", lab.spec(apart), "-o", "json"))
    peaks = {arm: found["footprint"]["peak_resident_bytes"] for arm, found in arms(data).items()}
    assert peaks == {"none": 80 * MIB, "bitmap": 40 * MIB}
    lab.check_nothing_is_left()


def test_a_step_that_a_guest_cannot_do_makes_its_trial_undecided(lab: Lab) -> None:
    """There is enough free memory, but in pieces: an embedded guest cannot move used memory."""
    phases = """\
    - {allocate: 40MiB, fragments: 64KiB}
    - {free: 50%}
    - {allocate: 30MiB}
arms:
"""
    text = re.sub(r"    - \{allocate.*?arms:\n", phases, spec(count="1"), flags=re.DOTALL)
    done = lab.run("run", lab.spec(text), "-o", "json")
    data = result(done, 3)
    assert data["state"] == "undecided"
    assert [trial["undecided"] != "" for trial in data["trials"]] == [True] * 4, "all have run"
    assert "the guest is out of memory" in data["reason"]
    assert "Traceback" not in done.stderr
    lab.check_nothing_is_left()


@pytest.mark.parametrize(("precision", "repetitions"), [("1GiB", 2), ("4KiB", 3)])
def test_a_run_goes_on_until_it_is_precise(lab: Lab, precision: str, repetitions: int) -> None:
    asked = f"precision: {precision}\nmax_repetitions: 3\n"
    data = result(lab.run("run", lab.spec(spec(count="1", per_host="1") + asked), "-o", "json"))
    assert data["state"] == "done", "with wide intervals, too"
    assert len(data["trials"]) == 2 * repetitions
    bitmap = arms(data)["bitmap"]
    assert bitmap["saved_bytes"]["pairs"] == repetitions
    assert bitmap["saved_bytes"]["first_look"] == 2
    assert bitmap["precision"]["is_enough"] == (precision == "1GiB")
    again = lab.run("run", "--resume", "latest", "-o", "json")
    assert "has no trial left to run" in again.stderr
    assert result(again) == data


def test_a_host_agent_that_is_not_there(lab: Lab) -> None:
    done = lab.run("run", lab.spec(SPEC), "--host", f"unix:{lab.folder}/nobody.sock")
    assert done.returncode == 1
    assert f"{lab.folder}/nobody.sock" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(lab.run("runs", "-o", "json").stdout) == []
    lab.check_nothing_is_left()


def test_a_host_agent_that_runs_already(lab: Lab, host_agent: HostAgent) -> None:
    short = lab.spec(spec(seed="7", **{"for": "300ms"}))
    data = result(lab.run("run", short, "--host", host_agent.control, "-o", "json"))
    assert arms(data)["bitmap"]["saved_bytes"]["pairs"] == 2
    assert host_agent.guests() == {}
    assert host_agent.process.poll() is None
    lab.check_nothing_is_left()
