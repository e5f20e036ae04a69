"""Reads the agent's configuration from a file or stdin; returns the default path of the file."""

from __future__ import annotations

import sys
from pathlib import Path

from hintfleet.agent_config import FW_CFG_NAME, MOST_JSON_BYTES, AgentConfig
from hintfleet.errors import InvalidInput
from hintfleet.settings import ATTACHED_CONFIG_PATH
from hintfleet.system.files import read_at_most

_FW_CFG = Path("/sys/firmware/qemu_fw_cfg/by_name") / FW_CFG_NAME / "raw"


def default_path() -> str:
    """Return the path of the configuration: the file that QEMU shows (fw_cfg) in a guest that the
    host agent has made, else the file that is written when a domain is attached."""
    return str(_FW_CFG) if _FW_CFG.exists() else ATTACHED_CONFIG_PATH


def read(path: str) -> AgentConfig:
    """Return the configuration in a file, or on the first line of stdin (`-`).

    :raises InvalidInput: the configuration cannot be read or is not valid. The message names the
        file, and the key if one is wrong.
    """
    try:
        if path == "-":
            return AgentConfig.from_json(sys.stdin.readline(MOST_JSON_BYTES), "on stdin")
        return AgentConfig.from_json(read_at_most(path, MOST_JSON_BYTES).decode(), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"cannot read the configuration {path}: {reason}") from error
