"""Fixtures: a running host agent, and labs for tests that run the command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agents import HostAgent, running_host_agent
from tests.support.lab import Lab, made_lab, on_this_machine


@pytest.fixture
def host_agent() -> Iterator[HostAgent]:
    with running_host_agent() as agent:
        yield agent


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with on_this_machine(), made_lab(tmp_path) as made:
        yield made


@pytest.fixture
def cleaning_lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab for tests that run `doctor --clean`, which acts on the whole machine: the fixture
    holds the machine's lock alone."""
    with on_this_machine(alone=True), made_lab(tmp_path) as made:
        yield made
