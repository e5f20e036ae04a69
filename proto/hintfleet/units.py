"""Parses sizes and durations that people write, and formats sizes for people.

A size or duration must have a unit. `512MiB` (binary) and `512MB` (decimal) are accepted, `512M` is
not.
"""

from __future__ import annotations

import re

from hintfleet.errors import InvalidInput

PAGE_BYTES = 4096
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZE_UNITS = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1 << 40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_TIME_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*")
_SIZE_LIMIT_BYTES = 1 << 63


def parse_size(text: str) -> int:
    """Return the bytes of a size, for example `384MiB`, `1.5GiB` or `2GB`.

    :raises InvalidInput: no number, no unit, an unknown unit, an ambiguous one (`4G`), not a
        whole number of bytes, or 8 EiB and more.
    """
    number, unit = _split(text, "size", "384MiB")
    # `4G` is 4 GiB for virsh and 4 * 10**9 for others: do not guess.
    if unit in ("K", "M", "G", "T"):
        raise InvalidInput(
            f"size {text!r}: the unit {unit!r} is ambiguous",
            hint=f"write {number}{unit}iB (binary) or {number}{unit}B (decimal)",
        )
    if unit not in _SIZE_UNITS:
        raise InvalidInput(
            f"size {text!r}: {'no unit' if not unit else f'unknown unit {unit!r}'}",
            hint="units are B, KiB, MiB, GiB, TiB and kB, MB, GB, TB, as in 384MiB",
        )
    # Integers: 2.03MB is 2030000 bytes, but as floats, 2.03 * 10**6 is not a whole number.
    whole, _, decimals = number.partition(".")
    scale: int = 10 ** len(decimals)
    size_bytes, rest = divmod(int(whole + decimals) * _SIZE_UNITS[unit], scale)
    if rest:
        raise InvalidInput(f"size {text!r} is not a whole number of bytes")
    if size_bytes >= _SIZE_LIMIT_BYTES:
        raise InvalidInput(f"size {text!r} is larger than any memory")
    return size_bytes


def parse_duration_s(text: str) -> float:
    """Return the seconds of a duration, for example `2s`, `500ms`, `1.5min` or `1h`.

    :raises InvalidInput: no number, no unit, or an unknown unit.
    """
    number, unit = _split(text, "duration", "2s")
    if unit not in _TIME_UNITS_S:
        raise InvalidInput(
            f"duration {text!r}: {'no unit' if not unit else f'unknown unit {unit!r}'}",
            hint="units are ms, s, m, min, h and d, as in 2s",
        )
    return float(number) * _TIME_UNITS_S[unit]


def _split(text: str, what: str, example: str) -> tuple[str, str]:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if not match:
        raise InvalidInput(f"{what} {text!r} is not a number with a unit, as in {example}")
    return match[1], match[2]


def format_size(size_bytes: float) -> str:
    """Format a size for people, in binary units: `1.25 GiB`, `12.5 GiB`, `384 MiB`.

    Two decimals below 10, one below 100, none from 100 on; none if the number is whole.
    """
    sign = "-" if size_bytes < 0 else ""
    size = abs(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1023.5:  # from 1023.5 on, it would be printed as 1024
            return f"{sign}{_three_digits(size)} {unit}"
        size /= 1024
    return f"{sign}{_three_digits(size)} TiB"


def _three_digits(value: float) -> str:
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"
