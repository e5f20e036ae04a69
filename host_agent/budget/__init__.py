"""A host's memory budget: the limit of all its guests together, enforced by a cgroup or watched."""
