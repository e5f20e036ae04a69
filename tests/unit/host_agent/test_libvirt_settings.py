"""Which hinting settings a real guest can have, and which are refused before it boots; its kernel
parameters; and that abandoned domains are not looked for on another machine."""

from typing import Any

import pytest

from hintfleet.errors import Refused
from hintfleet.settings import Driver
from hintfleet.v1 import host_pb2
from host_agent.guests.agent_settings import agent_config, check_hinting
from host_agent.guests.driver import GuestRequest
from host_agent.guests.libvirt.domain_leaks import abandoned_domains
from host_agent.guests.libvirt.driver import _kernel_parameters


def spec(parameters: str = "", **hinting: object) -> host_pb2.GuestSpec:
    settings = host_pb2.HintingSettings(**hinting)  # type: ignore[arg-type]
    return host_pb2.GuestSpec(
        method=host_pb2.HINTING, hinting=settings, kernel_parameters=parameters
    )


@pytest.mark.parametrize(
    ("hinting", "isolator"),
    [
        ({}, "kmod"),
        ({"tracker": "reported"}, "kmod"),
        ({"tracker": "bitmap"}, "hugetlb"),
        ({"isolator": "hugetlb", "tracker": "bitmap"}, "hugetlb"),
        ({"isolator": "hugetlb"}, "hugetlb"),
    ],
)
def test_a_tracker_brings_its_isolator(hinting: dict[str, str], isolator: str) -> None:
    assert check_hinting(Driver.LIBVIRT, spec(**hinting).hinting).isolator == isolator


@pytest.mark.parametrize(
    ("hinting", "said"),
    [
        ({"isolator": "embedded"}, "no isolator 'embedded'"),
        ({"tracker": "magic"}, "no tracker 'magic'"),
        ({"isolator": "kmod", "tracker": "bitmap"}, "has no tracker 'bitmap'"),
        ({"isolator": "hugetlb", "chunk_order": 10}, "order 9 only"),
    ],
)
def test_what_a_real_guest_cannot_do(hinting: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        check_hinting(Driver.LIBVIRT, spec(**hinting).hinting)
    assert caught.value.hint


def kernel_parameters(asked: host_pb2.GuestSpec) -> list[str]:
    request = GuestRequest(name="g", uuid="u", token="t", spec=asked, on_gone=print)
    return _kernel_parameters(asked, agent_config(Driver.LIBVIRT, request, "10.0.2.2:1", None))


def test_kernel_parameters_come_after_ours() -> None:
    assert kernel_parameters(spec("init_on_alloc=0  quiet", chunk_order=10)) == [
        *("hintfleet.isolator=kmod", "hintfleet.order=10", "init_on_alloc=0", "quiet")
    ]
    assert kernel_parameters(spec("a=1", isolator="hugetlb")) == ["a=1"]


def test_another_machines_domains_are_not_called_abandoned() -> None:
    with pytest.raises(Refused, match="are on another machine"):
        abandoned_domains("qemu+ssh://h2.example.org/system")
