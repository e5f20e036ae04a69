"""On which node of a Ray cluster the actor of each host is started."""

from orchestrator.trial.ray_cluster import spread


def test_hosts_are_spread_evenly() -> None:
    chosen = spread(["a", "b", "c", "d", "e"], {}, ["x", "y"])
    assert sorted(chosen.values()) == ["x", "x", "x", "y", "y"]


def test_a_host_that_lost_its_node_goes_where_the_fewest_are() -> None:
    where = {"a": "x", "b": "y", "c": "z", "d": "z"}
    assert spread(["a"], where, ["y", "z"]) == {"a": "y"}


def test_where_a_host_was_does_not_count_against_it() -> None:
    assert spread(["a"], {"a": "x", "b": "y", "c": "y"}, ["x", "y"]) == {"a": "x"}
