"""The lower bounds in pyproject.toml are not below what the generated stubs need, and not above the
versions that are tested (constraints.txt)."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

from tests.support.dependencies import lower_bounds

ROOT = Path(__file__).parents[2]
BOUNDS = lower_bounds()
TESTED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


@pytest.mark.parametrize(
    ("package", "stubs", "pattern"),
    [
        ("protobuf", "*_pb2.py", r"^# Protobuf Python Version: ([\d.]+)$"),
        ("grpcio", "*_pb2_grpc.py", r"^GRPC_GENERATED_VERSION = '([\d.]+)'$"),
    ],
)
def test_a_bound_is_what_the_stubs_demand(package: str, stubs: str, pattern: str) -> None:
    paths = list((ROOT / "proto/hintfleet/v1").glob(stubs))
    assert paths
    for path in paths:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
        assert found, path.name
        assert Version(BOUNDS[package]) >= Version(found[1]), f"{path.name} refuses older ones"


@pytest.mark.parametrize("package", BOUNDS)
def test_the_version_that_is_tested_is_allowed(package: str) -> None:
    tested = {name.replace("_", "-").lower(): version for name, version in TESTED.items()}
    assert Version(tested[package]) >= Version(BOUNDS[package])
