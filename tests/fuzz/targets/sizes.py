"""The parsers of sizes and durations, compared with exact fractions."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from hintfleet.errors import InvalidInput
from hintfleet.units import format_size, parse_duration_s, parse_size
from tests.fuzz.target import Target

_FACTORS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SECONDS = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
_LARGEST_BYTES = 1 << 63


def _exact(text: str, factors: dict[str, Fraction] | dict[str, int]) -> Fraction | None:
    match = re.fullmatch(r"\s*([0-9]{1,20})(?:\.([0-9]{1,20}))?\s*([a-zA-Z]*)\s*", text)
    if not match or match[3] not in factors:
        return None
    whole, decimals = match[1], match[2] or ""
    return Fraction(int(whole + decimals), 10 ** len(decimals)) * factors[match[3]]


def _size(text: str) -> None:
    wanted = _exact(text, _FACTORS)
    try:
        size_bytes = parse_size(text)
    except InvalidInput as error:
        str(error).encode()
        refused = wanted is None or wanted.denominator != 1 or wanted >= _LARGEST_BYTES
        assert refused, f"{text!r} is a size"
        return
    assert type(size_bytes) is int
    assert 0 <= size_bytes < _LARGEST_BYTES
    assert format_size(size_bytes)
    assert wanted == size_bytes


def _duration(text: str) -> None:
    wanted = _exact(text, _SECONDS)
    try:
        duration_s = parse_duration_s(text)
    except InvalidInput as error:
        str(error).encode()
        assert wanted is None
        return
    assert math.isfinite(duration_s)
    assert wanted is not None
    assert math.isclose(duration_s, wanted, rel_tol=1e-12)


def try_input(data: bytes) -> None:
    text = data.decode(errors="replace")
    _size(text)
    _duration(text)


TARGET = Target.of(
    try_input,
    seeds=(b"384MiB", b"1.5GiB", b"2GB", b"500ms", b"1.5min", b"4G", b" 0.1 TiB ", b"2.3TB"),
    words=(*_FACTORS, *_SECONDS, "9" * 20, "0" * 30, ".", "\u0665", "\u00a0", "\u3000"),
    max_bytes=6000,
    quick_runs=40_000,
)
