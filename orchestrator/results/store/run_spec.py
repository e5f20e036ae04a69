"""Reads the spec of a stored run again."""

from __future__ import annotations

from hintfleet.errors import InvalidInput, Refused
from orchestrator.results.store.reader import Run
from orchestrator.results.store.writer import spec_hash
from orchestrator.spec import file as spec_file
from orchestrator.spec.file import LoadedSpec
from orchestrator.spec.model import Spec


def spec_or_none(run: Run) -> Spec | None:
    """Return the spec of a stored run; None if this version cannot read it, or reads it
    differently."""
    try:
        return read_spec(run).spec
    except Refused:
        return None


def read_spec(run: Run) -> LoadedSpec:
    """Return the spec of a stored run, with the meaning that it had when the run began.

    :raises Refused: this version cannot read the spec, or reads it differently.
    """
    try:
        loaded = spec_file.parse(run.spec_text, f"spec of run {run.run_id}", run.overrides)
    except InvalidInput as error:
        raise Refused(f"this version cannot read its spec:\n{error.message}") from error
    # A default may differ between versions.
    if spec_hash(loaded.spec) != run.spec_hash:
        raise Refused("this version reads its spec differently")
    return loaded
