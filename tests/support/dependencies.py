"""The dependencies of pyproject.toml and their lower bounds.

Run as a script, prints constraints for pip that allow only the lowest version of each.
"""

import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_BOUNDED = re.compile(r"([\w.-]+)>=([\w.]+)")


def dependencies() -> Iterator[str]:
    """Yield every dependency as it is written, without its environment marker (`; ...`).

    Leaves out the entries with which an extra of ours includes another one: `hintfleet[...]`.
    """
    read = tomllib.loads(PYPROJECT.read_text())
    project = read["project"]
    lists = (
        read["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    )
    for written in chain.from_iterable(lists):
        if not written.startswith(f"{project['name']}["):
            yield written.partition(";")[0]


def lower_bounds() -> dict[str, str]:
    """Return the lowest version of each dependency by its name.

    :raises ValueError: a dependency is not written as NAME>=VERSION, or it is listed twice with
        different versions.
    """
    bounds: dict[str, str] = {}
    for written in dependencies():
        found = _BOUNDED.fullmatch(written)
        if found is None or bounds.setdefault(found[1], found[2]) != found[2]:
            raise ValueError(
                f"{PYPROJECT.name}: {written!r} should be one lower bound, NAME>=VERSION"
            )
    return bounds


if __name__ == "__main__":
    for name, version in lower_bounds().items():
        print(f"{name}=={version}")
