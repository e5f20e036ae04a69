"""Whether this machine can have real guests."""

from __future__ import annotations

import sys

from hintfleet.errors import Refused
from host_agent.guests.libvirt.api import modules
from host_agent.guests.libvirt.image import find_image


def can_have_real_guests() -> bool:
    """Return whether libvirt-python and the guest image are there; if not, say on stderr what is
    left out, and why."""
    try:
        find_image()
        modules()
    except Refused as error:
        print(f"without real guests: {error}", file=sys.stderr)
        return False
    return True
