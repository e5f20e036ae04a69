"""Running trials: the plan, the hosts, the actors."""
