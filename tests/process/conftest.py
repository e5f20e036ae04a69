"""Real agents on loopback."""

from collections.abc import Iterator

import pytest

from tests.support.agents import HostAgent, running_host_agent


@pytest.fixture
def host_agent() -> Iterator[HostAgent]:
    with running_host_agent() as agent:
        yield agent
