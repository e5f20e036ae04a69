"""Reads a spec, from a file or the catalogue, into the model. Errors about the text name file, line
and column."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hintfleet.errors import InvalidInput
from hintfleet.settings import Driver
from hintfleet.system.files import read_at_most
from orchestrator.spec import catalogue
from orchestrator.spec import checks as spec_checks
from orchestrator.spec.arms import Arm, Swap, Sweep
from orchestrator.spec.guests import LIST, MAPPING, GuestClass, Guests, Vary
from orchestrator.spec.model import Agent, Hosts, Spec, Timeouts, Under, UnderDriver
from orchestrator.spec.phases import Phase, Workload
from orchestrator.spec.problem import Problem
from orchestrator.spec.recording import Recording, read_recording
from orchestrator.spec.switchback import Switchback
from orchestrator.spec.values import keys_of
from orchestrator.spec.yaml_reader import Document, read_yaml
from orchestrator.spec.yaml_reader import Path as Keys

_MAX_FILE_BYTES = 1 << 20
_EARLY = ("driver", "under")
"""Keys that decide which values the others have."""
SET = "--set"
"""A key of overrides: a mapping of dotted keys of the spec to their values, as YAML text."""

# The class of the model at each path. An index of a list is "*".
_PARTS: dict[tuple[Hashable, ...], type[BaseModel]] = {
    (): Spec,
    ("hosts",): Hosts,
    ("hosts", "agents", "*"): Agent,
    ("guests",): Guests,
    ("guests", "*"): GuestClass,
    ("guests", "*", "workload"): Workload,
    ("guests", "*", "workload", "phases", "*"): Phase,
    ("vary",): Vary,
    ("workload",): Workload,
    ("workload", "phases", "*"): Phase,
    ("switchback",): Switchback,
    ("arms", "*"): Arm,
    ("arms", "*", "sweep"): Sweep,
    ("arms", "*", "swap"): Swap,
    ("recordings", "*"): Recording,
    ("timeouts",): Timeouts,
    ("under",): Under,
    **{("under", driver): UnderDriver for driver in Driver},
}


@dataclass(frozen=True, kw_only=True)
class LoadedSpec:
    """A spec and the document that it was read from.

    :ivar overrides: the top-level keys, with values, that replaced those in the document; SET; and
        the recordings, if any were read from files.
    :ivar moved: the path in the document of each key that was taken from `under`.
    """

    spec: Spec
    document: Document
    overrides: Mapping[str, Any] = field(default_factory=dict)
    moved: Mapping[Hashable, Keys] = field(default_factory=dict)

    def error(self, problems: Iterable[Problem]) -> InvalidInput:
        """Return one error with all these problems, each with its line."""
        return _error(self.document, self.moved, problems)


def load(name_or_path: str, overrides: dict[str, Any] | None = None) -> LoadedSpec:
    """Read an experiment of the catalogue, or, if none has this name, a spec file.

    :param overrides: top-level keys that replace those in the file; and SET.
    :raises InvalidInput: there is no such file, it cannot be read, or the spec is not valid (the
        message has the problems with their lines).
    """
    text, source = _read(name_or_path)
    return parse(text, source, overrides, Path(name_or_path).parent)


def parse(
    text: str,
    source: str,
    overrides: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> LoadedSpec:
    """Parse the text of a spec into the model.

    :param source: the file's name, for messages.
    :param overrides: top-level keys that replace those in the text; and SET.
    :param folder: from which files with recordings are read; None: they are in the text or in
        `overrides`.
    :raises InvalidInput: the spec is not valid; the message has the problems with their lines.
    """
    document = read_yaml(text, source)
    if not isinstance(document.data, dict):
        raise InvalidInput(
            f"{document.where(())}: a spec must be a mapping, for example 'name: quickstart'"
        )
    overrides = overrides or {}
    settings = overrides.get(SET, {})
    changed = {key: value for key, value in overrides.items() if key != SET}
    # Settings of `driver` and `under` are applied twice: here, because the driver's section depends
    # on them; and below with all others, because settings win over that section.
    early = {key: text for key, text in settings.items() if key.split(".")[0] in _EARLY}
    data = _with_settings(document.data | changed, early)
    driver = data.get("driver")
    section = _driver_section(data, driver)
    moved: dict[Hashable, Keys] = {
        key: ("under", driver, key) for key in section if key not in changed
    }
    values = _with_settings(data | section | changed, settings)
    if "recordings" in changed:  # of a stored run; those that --set gave are among them
        values["recordings"] = changed["recordings"]
    if folder is not None:
        recordings, problems = _recordings(values, folder)
        if problems:
            raise _error(document, moved, problems)
        if recordings:
            overrides = overrides | {"recordings": recordings}
            values["recordings"] = recordings
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        raise _error(document, moved, _problems(error)) from None
    loaded = LoadedSpec(spec=spec, document=document, overrides=overrides, moved=moved)
    if problems := list(spec_checks.problems(spec)):
        raise loaded.error(problems)
    return loaded


def _with_settings(values: dict[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a spec with those of `--set KEY=VALUE`.

    :raises InvalidInput: a value is not YAML, or a key is within something that is no mapping.
    """
    changed = dict(values)
    for key, text in settings.items():
        around = changed
        *outer, last = key.split(".")
        for step in outer:
            inside = around.get(step, {})
            if not isinstance(inside, dict):
                whole = key[: key.index(step) + len(step)]
                raise InvalidInput(
                    f"--set {key}: {whole} is no mapping in the spec",
                    hint=f"set it as a whole: --set '{whole}=...'",
                )
            around[step] = around = dict(inside)
        around[last] = read_yaml(text, f"--set {key}").data
    return changed


def _recordings(
    values: Mapping[str, Any], folder: Path
) -> tuple[tuple[dict[str, Any], ...], list[Problem]]:
    """Read the files that the phases replay, except those whose recordings are in `values`.

    :returns: the recordings, those in `values` included, as plain data; empty if no file was read.
        And the problems, with the paths of the phases that name the files.
    """
    known = values.get("recordings", ())
    if not isinstance(known, tuple):
        return (), []  # validating the spec reports it
    recordings = {str(one.get("name")) for one in known if isinstance(one, dict)}
    read: dict[str, dict[str, Any]] = {}
    found = []
    for path, name in _replayed(values):
        if name not in recordings and name not in read:
            try:
                read[name] = read_recording(folder / name, name).model_dump()
            except InvalidInput as error:
                found.append(Problem(path=path, message=error.message, hint=error.hint))
    return (*known, *read.values()) if read else (), found


def _replayed(values: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    """Yield for each phase that replays the path of its `replay` in the spec, and the recording's
    name."""
    # Values of a wrong type are ignored here: validating the spec reports them.
    guests = values.get("guests")
    classes = enumerate(guests if isinstance(guests, tuple) else ())
    owners = [((), values), *((("guests", i), one) for i, one in classes)]
    for path, owner in owners:
        workload = owner.get("workload") if isinstance(owner, dict) else None
        phases = workload.get("phases") if isinstance(workload, dict) else None
        for i, phase in enumerate(phases if isinstance(phases, tuple) else ()):
            name = phase.get("replay") if isinstance(phase, dict) else None
            if isinstance(name, str):
                yield (*path, "workload", "phases", i, "replay"), name


def _driver_section(data: dict[str, Any], driver: Any) -> dict[str, Any]:
    """Return the keys in `under` that replace top-level keys under this driver, with their values.

    Empty if there are none.
    """
    # Unknown keys and values of a wrong type are ignored here: validating the spec reports them.
    sections = data.get("under")
    if not isinstance(sections, dict) or not isinstance(driver, str):
        return {}
    section = sections.get(driver)
    known = keys_of(UnderDriver)
    return {k: v for k, v in section.items() if k in known} if isinstance(section, dict) else {}


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path in catalogue.names():
        return catalogue.text(name_or_path), f"{name_or_path} (catalogue)"
    try:
        content = read_at_most(name_or_path, _MAX_FILE_BYTES)
        return content.decode().replace("\r\n", "\n"), name_or_path
    except FileNotFoundError:
        raise _no_such_spec(name_or_path) from None
    except OSError as error:
        raise InvalidInput(f"cannot read the spec {name_or_path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"cannot read the spec {name_or_path}: it is not UTF-8: {error}"
        ) from error


def _no_such_spec(name: str) -> InvalidInput:
    near = difflib.get_close_matches(name, catalogue.names(), n=1)
    known = f"did you mean {near[0]!r}? " if near else ""
    return InvalidInput(
        f"there is no file {name!r} and no such experiment in the catalogue",
        hint=f"{known}`hintfleet experiments` lists the catalogue",
    )


def _problems(error: ValidationError) -> list[Problem]:
    details = [e | {"loc": _keys(e["loc"])} for e in error.errors()]
    around = {e["loc"][:n] for e in details for n in range(len(e["loc"]))}
    misspelt = {
        (*e["loc"][:-1], _near(e["loc"])) for e in details if e["type"] == "extra_forbidden"
    }
    # Left out: errors that pydantic reports only because of another error. A sequence with an
    # invalid item is also reported as too short, and the right name of a misspelt key as missing.
    implied = {"too_short": around, "missing": misspelt}
    return [_problem(e) for e in details if e["loc"] not in implied.get(e["type"], ())]


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the path of an error without MAPPING and LIST, the steps that pydantic adds to say
    which form `guests` has."""
    return tuple(step for step in path if step not in (MAPPING, LIST))


def _problem(error: Any) -> Problem:
    path: tuple[Hashable, ...] = error["loc"]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "hintfleet":
        return Problem(path=path, message=context["message"], hint=context["hint"])
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if kind == "missing":
        return Problem(path=path, message=f"the key {path[-1]!r} is missing")
    if kind == "too_short":
        return Problem(path=path, message="is empty; write at least one item")
    if kind == "string_pattern_mismatch" and path[-1] == "name":
        return Problem(
            path=path,
            message=f"{error['input']!r} is not a valid name",
            hint="use lower-case letters, digits and '-', for example bitmap-eager",
        )
    shown = repr(error["input"])
    # Pydantic's messages are "Input should be ...", "String should have ..." and the like. What is
    # before "should" is replaced by the value.
    _, _, text = error["msg"].partition(" should ")
    return Problem(path=path, message=f"{shown[:60]} should {text or error['msg']}")


def _unknown_key(path: tuple[Hashable, ...]) -> Problem:
    near = _near(path)
    hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(_known(path))}"
    return Problem(path=path, message=f"unknown key {path[-1]!r}", hint=hint)


def _known(path: tuple[Hashable, ...]) -> tuple[str, ...]:
    """Return the keys that are allowed in place of the last key of `path`."""
    around = tuple("*" if isinstance(step, int) else step for step in path[:-1])
    if around[:1] == ("under",) and len(around) > 2:
        around = around[2:]  # below a driver, the keys are those of what is replaced
    return keys_of(_PARTS[around]) if around in _PARTS else ()


def _near(path: tuple[Hashable, ...]) -> str:
    """Return the allowed key that is most like the last key of `path`; empty if none is similar."""
    return next(iter(difflib.get_close_matches(str(path[-1]), _known(path), 1)), "")


def _error(
    document: Document, moved: Mapping[Hashable, Keys], problems: Iterable[Problem]
) -> InvalidInput:
    # A mistake in `under` may be found twice: at its path in `under`, and at the path of the
    # top-level key that it replaces. The second path is changed to the first: both problems are
    # then equal, and `fromkeys` keeps one.
    unique = dict.fromkeys(
        replace(problem, path=(*moved.get(problem.path[0], problem.path[:1]), *problem.path[1:]))
        if problem.path
        else problem
        for problem in problems
    )
    ordered = sorted(unique, key=lambda p: astuple(document.position(p.path)))
    if len(ordered) == 1:
        return InvalidInput(_message(document, ordered[0]), hint=ordered[0].hint)
    lines = [
        _message(document, problem) + (f"\n  try: {problem.hint}" if problem.hint else "")
        for problem in ordered
    ]
    return InvalidInput("\n".join(lines))


def _message(document: Document, problem: Problem) -> str:
    dotted = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem.path
    ).lstrip(".")
    where = document.where(problem.path)
    return f"{where}: {dotted}: {problem.message}" if dotted else f"{where}: {problem.message}"
