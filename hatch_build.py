"""Compiles punch.c as the package is built or installed, where there is a compiler."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, LIBRARY = "host_agent/memory/punch.c", "host_agent/memory/libpunch.so"


class CompilePunch(BuildHookInterface[BuilderConfig]):
    """Without it, the host agent makes one call for each punch (host_agent/memory/punch.py)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Leave out what cannot be compiled; a library of an earlier build goes."""
        library = Path(self.root, LIBRARY)
        library.unlink(missing_ok=True)
        command = ["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", LIBRARY, SOURCE]
        try:
            subprocess.run(command, cwd=self.root, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{SOURCE} is not compiled: {error}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
