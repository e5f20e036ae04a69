"""Compiles punch.c when a wheel is built. If that fails, the wheel is built without it."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, LIBRARY = "host_agent/memory/punch.c", "host_agent/memory/libpunch.so"


class CompilePunch(BuildHookInterface[BuilderConfig]):
    """Adds the compiled library to the package.

    Without the library, the host agent punches by a loop in Python (host_agent/memory/punch.py).
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile the library; if that fails, warn and build the package without it."""
        library = Path(self.root, LIBRARY)
        library.unlink(missing_ok=True)  # an old one may be for another machine
        command = ["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", LIBRARY, SOURCE]
        try:
            subprocess.run(command, cwd=self.root, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{SOURCE} is not compiled: {error}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
