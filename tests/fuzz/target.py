"""What a fuzz target is, and where the targets and their kept inputs are.

A target knows nothing of the fuzzer: it takes bytes and raises if its oracle is
violated. So the kept inputs are replayed by plain pytest, without atheris.
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
    """One surface that takes input from outside.

    :ivar opened: makes ready what inputs are fed to, and takes it down again.
    :ivar seeds: inputs to start from besides the kept ones.
    :ivar words: byte strings that the fuzzer may put into inputs.
    :ivar quick_runs: inputs that take some seconds: what the tests run.
    """

    opened: Callable[[], AbstractContextManager[TryInput]]
    seeds: tuple[bytes, ...] = ()
    words: tuple[str, ...] = ()
    max_bytes: int = 4096
    quick_runs: int

    @classmethod
    def of(cls, try_input: TryInput, **settings: object) -> Target:
        """A target that needs nothing made ready."""
        return cls(opened=lambda: nullcontext(try_input), **settings)  # type: ignore[arg-type]


def load(name: str) -> Target:
    """The target of a module in `targets`."""
    found: Target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    return found


def kept_inputs(name: str) -> list[bytes]:
    """The kept corpus of a target, in an order that stays."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
