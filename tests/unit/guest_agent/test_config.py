"""A wrong configuration is answered with the key and what it must be."""

import json

import pytest

from guest_agent.config import Config, parse
from hintfleet.errors import InvalidInput

GOOD = {"server": "unix:/x", "guest_uuid": "u", "token": "t"}


def test_round_trip() -> None:
    config = Config(server="unix:/x", guest_uuid="u", token="t", ram_fd=5, memory="embedded")
    assert parse(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"server": "x"}), "'guest_uuid' is missing"),
        (json.dumps(GOOD | {"colour": 1}), "unknown key 'colour'"),
        (json.dumps(GOOD | {"method": "magic"}), "none or hinting"),
        (json.dumps(GOOD | {"isolator": "magic"}), "kmod or hugetlb or embedded"),
        (json.dumps(GOOD | {"chunk_order": 11}), "0 to 10"),
        (json.dumps(GOOD | {"isolator": "hugetlb", "chunk_order": 10}), "must be 9"),
        (json.dumps(GOOD | {"chunk_order": True}), "must be int"),
        (json.dumps(GOOD | {"token": 5}), "token must be str"),
        (json.dumps(GOOD | {"token": "\ud800"}), "not JSON.*surrogates"),
        (json.dumps(GOOD | {"memory_bytes": -1}), "memory_bytes is -1, must be 0 to"),
        (json.dumps(GOOD | {"ram_fd": 1 << 64}), "must be -1 to"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        parse(text)
