"""On which node of a Ray cluster each host runs, and what is said if there is no node for it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hintfleet.errors import InvalidInput, Refused
from hintfleet.settings import Driver
from hintfleet.units import GIB
from orchestrator.cluster import node_probe
from orchestrator.cluster.nodes import Node, node_of
from orchestrator.cluster.placement import (
    actor_count,
    check_nodes_named,
    groups,
    place,
    shortage,
    shortage_error,
)
from orchestrator.spec.memory_needs import ACTOR_BYTES
from orchestrator.spec.model import Timeouts
from orchestrator.trial.host_place import HostPlace, from_here
from orchestrator.trial.host_process import LogicalHost


def node(name: str, *, gib: float = 64, processors: float = 4, libvirt: bool = False) -> Node:
    return Node(
        node_id=f"id-{name}",
        name=name,
        hostname=f"{name}.example.org",
        address=f"10.0.0.{ord(name[0])}",
        processors=processors,
        available_bytes=int(gib * GIB) + ACTOR_BYTES,
        libvirt="qemu 7.2.0" if libvirt else "no libvirt",
        libvirt_usable=libvirt,
    )


def logical(count: int, *, gib: int = 1, driver: Driver = Driver.EMBEDDED) -> list[HostPlace]:
    return [
        HostPlace(
            name=f"host{i + 1}",
            driver=driver,
            memory_needed_bytes=GIB,
            timeouts=Timeouts(),
            logical=LogicalHost(name=f"host{i + 1}", memory_budget_bytes=GIB, driver=driver),
            node_memory_bytes=gib * GIB,
        )
        for i in range(count)
    ]


def agent(address: str, name: str = "host1", on: str = "") -> HostPlace:
    return replace(logical(1)[0], name=name, logical=None, address=address, node=on)


def counts(node_ids: dict[str, str]) -> dict[str, int]:
    return dict(Counter(node_ids.values()))


def test_hosts_are_spread_evenly_and_neighbours_share_a_node() -> None:
    placement = place(logical(5), [node("a"), node("b")], {})
    assert placement.node_ids == {f"host{i}": "id-a" if i < 4 else "id-b" for i in range(1, 6)}
    assert not placement.missing


def test_a_node_with_more_processors_gets_more_hosts() -> None:
    placement = place(logical(10), [node("a", processors=2), node("b", processors=8)], {})
    assert counts(dict(placement.node_ids)) == {"id-a": 2, "id-b": 8}


def test_a_host_that_lost_its_node_goes_where_the_fewest_are() -> None:
    placed = {"host1": "id-b", "host2": "id-c", "host3": "id-c"}
    found = place(logical(4), [node("b"), node("c")], placed).node_ids
    assert found == placed | {"host4": "id-b"}


def test_hosts_go_where_memory_is_and_the_others_are_named() -> None:
    nodes = [node("a", gib=1.5), node("b", gib=4), node("c", gib=0.1)]
    placement = place(logical(4, gib=2), nodes, {})
    assert counts(dict(placement.node_ids)) == {"id-b": 2}
    said = shortage_error(placement, nodes, 30)
    assert isinstance(said, Refused)
    assert (
        "2 of 4 hosts have no node (2 x embedded host of up to 2 GiB), after 30 s" in said.message
    )
    assert "b (10.0.0.98): room for 2, 4.06 GiB available" in said.message
    assert "c (10.0.0.99): room for 0" in said.message
    assert "start more nodes" in said.hint
    assert "timeouts: {nodes: " in said.hint


def test_libvirt_hosts_go_only_where_libvirt_is() -> None:
    nodes = [node("a"), node("b", libvirt=True), node("c")]
    hosts = logical(3, driver=Driver.LIBVIRT)
    assert counts(dict(place(hosts, nodes, {}).node_ids)) == {"id-b": 3}
    nowhere = place(hosts, [nodes[0], nodes[2]], {})
    assert "3 x libvirt host" in shortage(nowhere)
    assert "libvirt: no libvirt" in shortage_error(nowhere, nodes[:1], 30).message


def test_libvirt_hosts_may_run_on_this_machine_alone_where_libvirt_is_not_asked() -> None:
    here = node_probe.versions()
    alone = node_of("1", "here", "127.0.0.1", node_probe.look(here, None), here)
    placement = place(logical(2, gib=0, driver=Driver.LIBVIRT), [alone], {})
    assert not placement.missing


def test_paths_mean_the_folder_of_the_command_not_that_of_an_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = from_here(replace(agent("unix:run/host.sock"), tls_folder="tls"))
    assert (place.address, place.tls_folder) == (
        f"unix:{tmp_path}/run/host.sock",
        f"{tmp_path}/tls",
    )
    for address in ("h1:7070", "unix-abstract:x", "unix:/run/x"):
        assert from_here(agent(address)) == agent(address)


@pytest.mark.parametrize("called", ["b", "b.example.org", "10.0.0.98", "id-b"])
def test_a_host_agent_is_on_the_node_that_was_named(called: str) -> None:
    nodes = [node("a"), node("b"), node("c")]
    hosts = [agent("unix:/run/x", on=called), agent("h2:7070", "host2", on=called)]
    check_nodes_named(hosts, nodes)
    assert place(hosts, nodes, {}).node_ids == {"host1": "id-b", "host2": "id-b"}


def test_a_node_that_is_not_there_is_named() -> None:
    missing = place([agent("unix:/run/x", on="d")], [node("a")], {})
    assert shortage(missing) == "1 of 1 hosts have no node (1 x host agent on node d)"


@pytest.mark.parametrize("address", ["unix:/run/x", "unix-abstract:x", "127.0.0.1:7070", "[::1]:7"])
def test_an_address_on_one_machine_needs_a_node_if_there_are_several(address: str) -> None:
    check_nodes_named([agent(address)], [node("a")])
    check_nodes_named([agent("h1.example.org:7070")], [node("a"), node("b")])
    with pytest.raises(InvalidInput, match="the Ray cluster has 2 nodes") as caught:
        check_nodes_named([agent(address)], [node("a"), node("b")])
    assert f"--host {address},node=NAME; nodes: a, b" in caught.value.hint


def test_two_nodes_of_one_name_leave_it_uncertain() -> None:
    twins = [node("a"), replace(node("a"), node_id="other")]
    with pytest.raises(InvalidInput, match="2 nodes are called 'a'") as caught:
        check_nodes_named([agent("unix:/run/x", on="a")], twins)
    assert "--node-name" in caught.value.hint
    check_nodes_named([agent("unix:/run/x", on="other")], twins)


def test_a_thousand_hosts_have_tens_of_actors() -> None:
    nodes = [node(letter, processors=16, gib=1000) for letter in "abcdefghij"]
    hosts = logical(1000)
    placement = place(hosts, nodes, {})
    made = list(groups([host.name for host in hosts], placement.node_ids, nodes))
    assert len(made) == 40
    assert Counter(node_id for node_id, _ in made) == {each.node_id: 4 for each in nodes}
    assert [name for _, names in made for name in names] == [host.name for host in hosts]


def test_a_node_has_no_more_actors_than_processors() -> None:
    assert [actor_count(hosts, 2) for hosts in (1, 32, 33, 1000)] == [1, 1, 2, 2]
    assert actor_count(100, 0.5) == 1


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 64), st.booleans()), max_size=6),
    st.booleans(),
)
def test_no_node_gets_more_than_it_has(
    count: int, sizes: list[tuple[float, float, bool]], libvirt: bool
) -> None:
    hosts = logical(count, driver=Driver.LIBVIRT if libvirt else Driver.EMBEDDED)
    nodes = [
        node(f"{i}", gib=gib, processors=processors, libvirt=has)
        for i, (gib, processors, has) in enumerate(sizes)
    ]
    placement = place(hosts, nodes, {})
    assert len(placement.node_ids) + len(placement.missing) == count
    on = counts(dict(placement.node_ids))
    for each in nodes:
        there = on.get(each.node_id, 0)
        taken = there * GIB + actor_count(there, each.processors) * ACTOR_BYTES
        assert taken <= each.available_bytes
        assert each.libvirt_usable or not there or not libvirt
        one_more = (there + 1) * GIB + actor_count(there + 1, each.processors) * ACTOR_BYTES
        if placement.missing and (each.libvirt_usable or not libvirt):
            assert one_more > each.available_bytes, "there was room for one more"
    again = place(hosts, nodes, placement.node_ids)
    assert again == placement, "hosts that have a node keep it"
