"""Every error class except StableError, a base, survives the conversion to a gRPC status and back,
with its hint; long texts are shortened. Only InvalidInput has the exit code of wrong usage."""

from urllib.parse import quote

import pytest

from hintfleet import errors
from hintfleet.errors import ExitCode, GuestLost, HintfleetError, from_status, to_status

CLASSES = [
    errors.HintfleetError,
    errors.TransientError,
    errors.Refused,
    errors.InvalidInput,
    errors.NotFound,
    errors.LimitExceeded,
    errors.GuestLost,
    errors.OutcomeUnknown,
]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("hint", ["", "try this: ünï"])
def test_round_trip(kind: type[HintfleetError], hint: str) -> None:
    back = from_status(*to_status(kind("what failed", hint=hint)))
    assert type(back) is kind
    assert (back.message, back.hint) == ("what failed", hint)


def test_text_for_people_says_what_to_try() -> None:
    assert str(errors.Refused("it failed", hint="do that")) == "it failed\n  try: do that"


def test_only_wrong_input_is_a_usage_error() -> None:
    usage = [kind for kind in CLASSES if kind("x").exit_code == ExitCode.USAGE]
    assert usage == [errors.InvalidInput]


@pytest.mark.parametrize(
    "log",
    [
        "x" * 20_000,
        "\N{REPLACEMENT CHARACTER}" * 20_000,
        "\N{GRINNING FACE}" * 20_000,
        "x" * 1500 + "\N{REPLACEMENT CHARACTER}" * 20_000 + "x" * 1500,
    ],
    ids=["narrow", "wide", "widest", "wide in the middle"],
)
def test_an_error_with_a_long_log_arrives(log: str) -> None:
    """gRPC gives RESOURCE_EXHAUSTED in place of a status of more than 8 KiB."""
    error = GuestLost(f"guest g: it ended: {log} the end", hint="look " * 9_000)
    found = from_status(*to_status(error))
    assert isinstance(found, GuestLost)
    assert found.message.startswith("guest g: it ended: ")
    assert found.message.endswith(" the end")
    assert 4096 - 2 * len(quote("\N{GRINNING FACE}")) <= len(quote(found.message)) <= 4096
    assert len(found.hint) < 2000
