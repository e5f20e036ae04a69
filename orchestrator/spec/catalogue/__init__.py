"""The experiments that ship with hintfleet."""

from __future__ import annotations

from importlib.resources import files


def names() -> tuple[str, ...]:
    """Return the names of all experiments, sorted."""
    return tuple(
        sorted(
            entry.name.removesuffix(".yaml")
            for entry in files(__name__).iterdir()
            if entry.name.endswith(".yaml")
        )
    )


def text(name: str) -> str:
    """Return the spec of an experiment that `names` lists, as YAML."""
    return files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
