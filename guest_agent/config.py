"""Reads the agent's configuration from where the host agent has put it."""

from __future__ import annotations

import sys

from hintfleet.agent_config import MOST_JSON_BYTES, AgentConfig
from hintfleet.errors import InvalidInput
from hintfleet.system.files import read_at_most


def read(path: str) -> AgentConfig:
    """Return the configuration in a file, or on the first line of stdin (`-`).

    :raises InvalidInput: it cannot be read, or is not valid; names the file, and the key if one
        is wrong.
    """
    try:
        if path == "-":
            return AgentConfig.from_json(sys.stdin.readline(MOST_JSON_BYTES), "on stdin")
        return AgentConfig.from_json(read_at_most(path, MOST_JSON_BYTES).decode(), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"cannot read the configuration {path}: {reason}") from error
