"""The nodes of a cluster and of a run, as tables at 80 columns."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType

from orchestrator.cluster.nodes import Node
from orchestrator.results.store.reader import Store
from orchestrator.view.node_tables import cluster_table, hosts_by_node, places_table, short_list
from tests.support.stored import NODE, store_run


def shown(table: RenderableType) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_consecutive_hosts_are_one_word() -> None:
    assert short_list(["host1", "host2", "host3", "host7"]) == "host1-3, host7"
    assert short_list([f"host{i}" for i in range(1000, 0, -1)]) == "host1-1000"
    assert short_list(["host10", "host9"]) == "host9-10"
    assert short_list([]) == "-"


def test_a_cluster_at_80_columns() -> None:
    able = replace(
        NODE,
        processors=64.0,
        memory_bytes=256 << 30,
        available_bytes=200 << 30,
        libvirt="qemu 7.2.0, KVM",
        libvirt_usable=True,
    )
    unable = replace(
        able, name="rack-2", libvirt="libvirt (Python): not installed", libvirt_usable=False
    )
    bad = Node(node_id="3", name="rack-3", address="10.0.0.3", problem="has no hintfleet")
    text = shown(cluster_table([able, unable, bad]))
    assert all(len(line) <= 80 for line in text.splitlines())
    words = " ".join(text.split())
    assert "64 processors" in words
    assert "200 GiB of 256 GiB" in words
    for part in ("rack-1", "libvirt guests: qemu", "no libvirt guests:", "nothing: it has no"):
        assert part in words, text
    assert "…" not in text, "nothing is cut"


def test_where_the_hosts_of_a_run_were(tmp_path: Path) -> None:
    store_run(tmp_path)
    with Store(tmp_path) as store:
        run = store.find_run("run1")
        trials = store.trials("run1")
    assert run.nodes == {NODE.node_id: NODE}
    assert trials[0].places == {"host1": NODE.node_id, "host2": NODE.node_id}
    text = shown(places_table(run, trials))
    for part in ("rack-1", "10.0.0.1", "host1-2", "Python 3.11.2", "ray 2.60.0", "Linux 6.1"):
        assert part in text

    resumed = replace(run, nodes=run.nodes | {"again": replace(NODE, node_id="again")})
    later = replace(trials[1], places={"host2": "again", "host3": "again"})
    text = shown(places_table(resumed, [trials[0], later]))
    assert text.count("rack-1") == 1
    assert "host1-3" in text

    moved = [trials[0], replace(trials[1], places={"host1": "other", "host2": NODE.node_id})]
    assert hosts_by_node(moved) == {NODE.node_id: ["host1", "host2"], "other": ["host1"]}
