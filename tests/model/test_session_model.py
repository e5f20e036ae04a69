"""Spin checks the model of the session protocol (session.pml) exhaustively, within bounds, and
finds an error in each mutation of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).with_name("session.pml")
MUTATIONS = dict(re.findall(r"#define (\w+)\s+\(MUTATION == (\d+)\)", MODEL.read_text()))

pytestmark = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")),
    reason="the protocol's model is not checked: that needs Debian's spin and gcc"
    " (deploy/system/install)",
)


def check(folder: Path, **bounds: int) -> str:
    """Let Spin check the model, at most to the first error or its memory limit; return the output.

    :param bounds: macros to define in the model.
    """
    defines = [f"-D{name}={value}" for name, value in bounds.items()]
    shutil.copy(MODEL, folder)
    run(folder, "spin", *defines, "-a", MODEL.name)
    # With so few states, optimising (-O2) would take longer than it saves.
    run(folder, "gcc", "-O0", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=2048", "-o", "pan", "pan.c")
    said = run(folder, "./pan", "-m10000")
    assert "error: max search depth too small" not in said, said
    return said


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trail(folder: Path) -> str:
    """Return the last steps before the error that `check` has found, in the model with
    BATCHES=3."""
    return run(folder, "spin", "-DBATCHES=3", "-t", "-p", "-l", "-g", MODEL.name)[-20_000:]


def test_no_run_drops_a_chunk_in_use_or_leaves_one_isolated(tmp_path: Path) -> None:
    said = check(tmp_path, MUTATION=0, BATCHES=3)
    print(re.search(r"\d+ states, stored", said)[0])  # type: ignore[index]
    assert "errors: 0" in said, said + trail(tmp_path)
    assert "Search not completed" not in said


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_of_the_protocol_drops_a_chunk_in_use(tmp_path: Path, mutation: str) -> None:
    said = check(tmp_path, MUTATION=int(MUTATIONS[mutation]), BATCHES=2)
    assert "errors: 1" in said
    assert re.search(r"assertion violated .*(isolated|ram_open)", said), said
