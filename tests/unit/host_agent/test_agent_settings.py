"""The settings of a guest's agent follow its spec; what the spec leaves out has the default of spec
files. What a driver does not have is refused."""

from pathlib import Path
from typing import Any

import pytest

from hintfleet.errors import InvalidInput, Refused
from hintfleet.settings import PARTS, Driver, Method, Policy
from hintfleet.v1 import hinting_pb2, host_pb2
from host_agent.guests.agent_settings import agent_config, check_hinting
from host_agent.guests.driver import GuestRequest, Survival
from host_agent.session.messages import policy_of
from orchestrator.spec.arms import Arm


def request(method: host_pb2.Method.ValueType, **hinting: Any) -> GuestRequest:
    settings = host_pb2.HintingSettings(**hinting)
    spec = host_pb2.GuestSpec(method=method, hinting=settings, max_memory_bytes=1 << 30)
    return GuestRequest(name="g", uuid="u", token="t", spec=spec, on_gone=print)


def test_what_a_guest_is_not_told_is_the_default_of_spec_files() -> None:
    arm = Arm.model_validate({"name": "a", "method": "hinting"})
    config = agent_config(Driver.EMBEDDED, request(host_pb2.HINTING), "unix:/x", None)
    assert (config.chunk_order, config.threshold_chunks) == (arm.chunk_order, arm.threshold_chunks)
    policy = policy_of(host_pb2.HintingSettings())
    assert policy.report_period_ms == round(1000 * arm.report_period_s) == 100
    assert policy.cold_after_ms == round(1000 * arm.cold_after_s)
    assert policy.break_even_ms == round(1000 * arm.break_even_s)
    assert hinting_pb2.Policy.Kind.Name(policy.kind) == arm.policy.name


def test_what_a_guest_is_told() -> None:
    survival = Survival(folder=Path("/nowhere"), doors=Path("/nowhere"), orphan_after_s=7)
    asked = request(host_pb2.HINTING, chunk_order=8, threshold_chunks=1 << 20, tracker="reported")
    config = agent_config(Driver.EMBEDDED, asked, "unix:/x", survival)
    assert (config.isolator, config.tracker) == ("embedded", "reported")
    assert (config.chunk_order, config.threshold_chunks) == (8, 1 << 20)
    assert (config.max_memory_bytes, config.orphan_after_s) == (1 << 30, 7)
    assert config.method is Method.HINTING


@pytest.mark.parametrize("method", [host_pb2.NONE, host_pb2.REPORTING, host_pb2.BALLOON])
def test_under_other_methods_an_agent_only_runs_the_workload(
    method: host_pb2.Method.ValueType,
) -> None:
    assert agent_config(Driver.LIBVIRT, request(method), "h:1", None).method is Method.NONE


@pytest.mark.parametrize("driver", Driver)
def test_all_that_a_driver_has_can_be_asked_for(driver: Driver) -> None:
    for parts in PARTS[driver]:
        for policy in Policy:
            asked = host_pb2.HintingSettings(
                isolator=parts.isolator, tracker=parts.tracker, policy=policy
            )
            assert check_hinting(driver, asked) == parts


@pytest.mark.parametrize(
    ("hinting", "said", "hint"),
    [
        ({"isolator": "kmod"}, "an embedded guest has no isolator 'kmod'", "isolator: embedded"),
        ({"tracker": "x"}, "an embedded guest has no tracker 'x'", "tracker: bitmap or reported"),
    ],
)
def test_what_an_embedded_guest_does_not_have(
    hinting: dict[str, str], said: str, hint: str
) -> None:
    with pytest.raises(Refused, match=said) as caught:
        check_hinting(Driver.EMBEDDED, host_pb2.HintingSettings(**hinting))  # type: ignore[arg-type]
    assert caught.value.hint == hint


def test_a_setting_out_of_its_bounds_makes_no_guest() -> None:
    with pytest.raises(InvalidInput, match="chunk_order is 11, must be 0 to 10"):
        agent_config(Driver.EMBEDDED, request(host_pb2.HINTING, chunk_order=11), "unix:/x", None)
