"""The definition of a fuzz target, and where the targets and their kept inputs are.

A target does not depend on the fuzzer: it takes bytes and raises if its oracle is violated. So
plain pytest can replay the kept inputs, without atheris.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules

from tests.fuzz import targets

TryInput = Callable[[bytes], None]
"""Feed one input; any exception is a finding."""

CORPUS = Path(__file__).parent / "corpus"
DATA = Path(__file__).parents[1] / "data"
NAMES = sorted(module.name for module in iter_modules(targets.__path__))


@dataclass(frozen=True, kw_only=True)
class Target:
    """One interface that takes input from outside.

    :ivar opened: makes a context manager, which sets up the interface, yields the function that
        feeds one input to it, and tears it down.
    :ivar seeds: inputs to start from besides the kept ones.
    :ivar words: strings that the fuzzer may put into inputs.
    :ivar quick_runs: how many inputs the tests run: as many as take some seconds.
    """

    opened: Callable[[], AbstractContextManager[TryInput]]
    seeds: tuple[bytes, ...] = ()
    words: tuple[str, ...] = ()
    max_bytes: int = 4096
    quick_runs: int

    @classmethod
    def of(cls, try_input: TryInput, **settings: object) -> Target:
        """Return a target that needs no set-up."""
        return cls(opened=lambda: nullcontext(try_input), **settings)  # type: ignore[arg-type]


def load(name: str) -> Target:
    """Return the target that the module of this name in `targets` defines."""
    found: Target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    return found


def kept_inputs(name: str) -> list[bytes]:
    """Return the kept corpus of a target, always in the same order."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
