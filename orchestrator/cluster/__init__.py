"""The Ray cluster that carries the hosts of a run: its nodes and actors, and what runs where."""
