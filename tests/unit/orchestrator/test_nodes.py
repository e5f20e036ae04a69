"""What a node of a Ray cluster answers, why hosts cannot run there, and which cluster is meant."""

import pytest

from hintfleet.errors import InvalidInput
from orchestrator.cluster import node_probe
from orchestrator.cluster.nodes import Node, node_of, unusable_error
from orchestrator.cluster.ray_cluster import cluster_address, no_answer_error

HERE = {"Python": "3.11.2", "ray": "2.60.0", "hintfleet": "0.1.0"}


def seen(missing: tuple[str, ...] = (), **versions: str) -> Node:
    answer = {"hostname": "rack", "environment": HERE | versions, "missing": missing}
    return node_of("1a2b", "10.0.0.1", "10.0.0.1", answer, HERE)


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (seen(), ""),
        (seen(hintfleet="0.2.0"), "has hintfleet 0.2.0, here it is 0.1.0"),
        (seen(hintfleet=""), "has no hintfleet"),
        (
            seen(Python="3.11.4", ray="2.59.0"),
            "has Python 3.11.4, here it is 3.11.2, has ray 2.59.0, here it is 2.60.0",
        ),
        (seen(missing=("grpcio", "pydantic")), "lacks grpcio, pydantic"),
        (node_of("1a2b", "n", "a", "did not answer in 60 s", HERE), "did not answer in 60 s"),
    ],
)
def test_why_no_host_can_run_on_a_node(node: Node, problem: str) -> None:
    assert node.problem == problem


def test_all_that_must_be_mended_is_in_one_error() -> None:
    bad = [seen(hintfleet="0.2.0"), *[seen(hintfleet="")] * 8]
    error = unusable_error(bad, HERE)
    assert "rack (10.0.0.1): has hintfleet 0.2.0, here it is 0.1.0\n" in error.message
    assert error.message.endswith("and 4 more nodes")
    assert "Python 3.11.2, ray==2.60.0 and 'hintfleet[embedded,orchestrator]==0.1.0'" in error.hint


def test_a_node_has_the_name_it_was_given_or_its_hostname() -> None:
    answer = {"hostname": "rack", "environment": HERE, "missing": ()}
    assert node_of("1", "10.0.0.1", "10.0.0.1", answer, HERE).label == "rack (10.0.0.1)"
    assert node_of("1", "two", "10.0.0.1", answer, HERE).label == "two (10.0.0.1)"


def test_this_machine_could_be_a_node() -> None:
    here = node_probe.versions()
    node = node_of("1", "here", "10.0.0.1", node_probe.look(here, None), here)
    assert node.problem == ""
    assert 0 < node.available_bytes <= node.memory_bytes
    assert node.environment.items() >= here.items()
    assert node.libvirt == ""


def test_a_silent_node_is_told_apart_from_one_that_cannot_run_hosts() -> None:
    silent = node_of("1", "n1", "10.0.0.1", None, HERE)
    assert (silent.is_silent, silent.problem) == (True, "did not answer in time")
    refused = node_of("1", "n1", "10.0.0.1", "cannot be asked: no module", HERE)
    assert (refused.is_silent, refused.problem) == (False, "cannot be asked: no module")


def test_libvirt_is_asked_on_the_node() -> None:
    answer = node_probe.look(node_probe.versions(), "qemu+unix:///session?socket=/nothing")
    assert not answer["libvirt_usable"]
    assert answer["libvirt"]
    assert "\n" not in answer["libvirt"]


@pytest.mark.parametrize(
    ("option", "variable", "value"),
    [
        (None, None, ""),
        (None, "", ""),
        (None, "local", ""),
        (None, "auto", "auto"),
        ("auto", None, "auto"),
        ("h1:6379", "h2:6379", "h1:6379"),
        ("local", "h2:6379", ""),
    ],
)
def test_an_option_comes_before_the_variable(
    option: str | None, variable: str | None, value: str
) -> None:
    environment = {} if variable is None else {"RAY_ADDRESS": variable}
    assert cluster_address(option, environment).value == value


def test_an_error_names_what_was_given() -> None:
    option = no_answer_error(cluster_address("h1:6379", {}), "refused")
    assert option.message == "no Ray cluster answers at --address h1:6379: refused"
    assert "--address local to run on this machine alone" in option.hint
    variable = no_answer_error(cluster_address(None, {"RAY_ADDRESS": "h1:6379"}), "refused")
    assert variable.message == "no Ray cluster answers at RAY_ADDRESS=h1:6379: refused"
    for wrong in ("", "h1", "ray://h1:10001"):
        with pytest.raises(InvalidInput, match=f"^--address '?{wrong}"):
            cluster_address(wrong, {"RAY_ADDRESS": "h2:6379"})
