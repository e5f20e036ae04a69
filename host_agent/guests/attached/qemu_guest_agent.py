"""Writes files and runs programs in a guest through the QEMU guest agent, without network or ssh.

The commands of the QEMU guest agent are documented in QEMU's qga/qapi-schema.json. The domain needs
the channel org.qemu.guest_agent.0, and the guest needs the package qemu-guest-agent.
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import PurePosixPath
from typing import Any

from hintfleet.errors import Refused
from host_agent.guests.libvirt.api import errors_as, modules

_TIMEOUT_S = 10
# How long to wait for a program: longer than systemd waits for a service to stop
# (DefaultTimeoutStopSec, 90 s). In a guest that had just begun to boot, on a busy host, a program
# has taken longer than 30 s.
_RUN_TIMEOUT_S = 120.0
_POLL_S = 0.1


class QemuGuestAgent:
    """The QEMU guest agent of a running domain. Methods raise GuestLost if the domain is gone."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def write(self, path: str, text: str) -> None:
        """Write a file that only its owner can read (root, if it is new). Replace the text of an
        older file; make the folder if it is missing.

        :raises Refused: the QEMU guest agent does not answer, or a step fails in the guest. The
            file may be empty or incomplete then.
        """
        self.run("mkdir", "-p", str(PurePosixPath(path).parent))
        self.run("touch", path)
        self.run("chmod", "0600", path)
        handle = self._ask("guest-file-open", path=path, mode="w")
        try:
            data = base64.b64encode(text.encode()).decode()
            self._ask("guest-file-write", handle=handle, **{"buf-b64": data})
        finally:
            self._ask("guest-file-close", handle=handle)

    def run(self, program: str, *arguments: str) -> None:
        """Run a program and wait for its end, 120 s at most.

        :raises Refused: the QEMU guest agent does not answer; the program has not ended in time,
            and runs on; or it failed: the message has the last line of its stderr, or, if
            there is none, its exit code.
        """
        started = self._ask(
            "guest-exec", path=program, arg=list(arguments), **{"capture-output": True}
        )
        deadline_s = time.monotonic() + _RUN_TIMEOUT_S
        while not (status := self._ask("guest-exec-status", pid=started["pid"]))["exited"]:
            if time.monotonic() > deadline_s:
                raise Refused(f"`{program}` in the guest does not end")
            time.sleep(_POLL_S)
        if status.get("exitcode") or "signal" in status:
            said = base64.b64decode(status.get("err-data", "")).decode(errors="replace").strip()
            line = (said.splitlines() or [f"exit code {status.get('exitcode')}"])[-1]
            raise Refused(f"`{' '.join((program, *arguments))}` failed in the guest: {line}")

    def _ask(self, command: str, **arguments: object) -> Any:
        _, libvirt_qemu = modules()
        with errors_as(
            "asking the QEMU guest agent",
            hint="start qemu-guest-agent in the guest, or put the configuration there by hand",
        ):
            query = json.dumps({"execute": command, "arguments": arguments})
            answer = libvirt_qemu.qemuAgentCommand(self._domain, query, _TIMEOUT_S, 0)
        return json.loads(answer)["return"]
