"""A doctor's finding is the same after the conversion to JSON and back, by which the host agent's
doctor sends it to the orchestrator. Also which drivers need what was checked."""

import json

import pytest

from hintfleet.findings import Finding
from hintfleet.settings import Driver

MISSING = Finding(
    name="guest image", ok=False, detail="gone", hint="make", needed_for=Driver.LIBVIRT
)


def test_round_trip() -> None:
    assert Finding.from_json(json.loads(json.dumps(MISSING.as_json()))) == MISSING


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"name": "x", "ok": True, "needed_for": "libvirt"}, TypeError),
        (MISSING.as_json() | {"more": 1}, TypeError),
        (MISSING.as_json() | {"needed_for": "xen"}, ValueError),
    ],
)
def test_what_is_not_a_finding(data: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        Finding.from_json(data)


def test_every_driver_needs_what_embedded_guests_need() -> None:
    memfd = Finding(name="memfd", ok=True, detail="can be made")
    assert memfd.needed_by(Driver.EMBEDDED)
    assert memfd.needed_by(Driver.LIBVIRT)
    assert MISSING.needed_by(Driver.LIBVIRT)
    assert not MISSING.needed_by(Driver.EMBEDDED)
