"""Runs libFuzzer in workers, each in a process of its own: `fuzz` fuzzes a target, and returns
figures and findings; `keep` makes a new kept corpus from the old one and the found inputs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.target import CORPUS, load

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "build/fuzz/found"
CRASHES = ROOT / "build/fuzz/crashes"

_LONGEST_INPUT_S = 10
_MOST_RSS_MIB = 1024
_SEED = 1
_GRACE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one worker.

    :ivar edges: how many branches of the measured packages were reached.
    :ivar new_entries: how many inputs were added to the folder of found inputs: for new branches
        or hit counts, or as smaller inputs.
    :ivar crashes: new files with inputs that violated the oracle, or took too much time or memory.
    :ivar exit_code: the worker's exit code; 0 if it finished.
    :ivar output: all output of the worker, for people.
    """

    target: str
    inputs: int
    inputs_per_s: int
    edges: int
    corpus_entries: int
    new_entries: int
    crashes: tuple[Path, ...]
    exit_code: int
    output: str

    @property
    def failed(self) -> bool:
        """Return whether there is a finding, the worker failed, or no input was run at all."""
        return bool(self.crashes or self.exit_code) or not self.inputs

    def __str__(self) -> str:
        return (
            f"{self.target:12} {self.inputs:>10} {self.inputs_per_s:>8} {self.edges:>6} "
            f"{self.corpus_entries:>7} {self.new_entries:>5} {len(self.crashes):>8}"
        )


HEADING = (
    f"{'target':12} {'inputs':>10} {'per s':>8} {'edges':>6} {'corpus':>7} {'new':>5} "
    f"{'crashes':>8}"
)


def fuzz(name: str, *, runs: int = -1, seconds: int = 0, found_in: Path = FOUND) -> Result:
    """Fuzz one target until `runs` inputs are run, `seconds` have passed, or there is a finding.
    -1 runs, and 0 seconds, mean that there is no such limit.

    With the same kept and found inputs and the same number of runs, the inputs are the same again,
    because the seed is fixed.
    """
    found = found_in / name
    CRASHES.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    entries, crashes = set(found.iterdir()), set(_crashes(name))
    with _worker(name) as (command, seeds):
        output, exit_code = _run(
            [
                *(*command, f"-seed={_SEED}", f"-runs={runs}", f"-max_total_time={seconds}"),
                *("-print_final_stats=1", "-keep_seed=1", f"-artifact_prefix={CRASHES}/{name}-"),
                *(str(folder) for folder in (found, CORPUS / name, seeds)),
            ],
            seconds + _GRACE_S if seconds else None,
        )
    return Result(
        target=name,
        inputs=_stat(output, r"^stat::number_of_executed_units: +(\d+)"),
        inputs_per_s=_stat(output, r"^stat::average_exec_per_sec: +(\d+)"),
        edges=_stat(output, r"^#\d+.* cov: (\d+)"),
        corpus_entries=_stat(output, r"^#\d+.* corp: (\d+)"),
        new_entries=len(set(found.iterdir()) - entries),
        crashes=tuple(sorted(set(_crashes(name)) - crashes)),
        exit_code=exit_code,
        output=output,
    )


def keep(name: str) -> int:
    """Replace a target's kept corpus by a few inputs that reach all that the kept corpus, the
    seeds and the inputs in `FOUND` reach.

    :returns: how many inputs are kept.
    :raises RuntimeError: no input would be kept; the corpus is unchanged.
    """
    kept = CORPUS / name
    with _worker(name) as (command, seeds), tempfile.TemporaryDirectory() as fewest:
        sources = [str(folder) for folder in (kept, FOUND / name, seeds) if folder.is_dir()]
        output, _ = _run([*command, "-merge=1", fewest, *sources], None)
        inputs = [path.read_bytes() for path in Path(fewest).iterdir()]
        if not inputs:
            raise RuntimeError(f"nothing is left of the corpus of {name}:\n{output}")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for data in inputs:
        (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return len(inputs)


@contextmanager
def _worker(name: str) -> Iterator[tuple[list[str], Path]]:
    """Yield the command of a worker, and a folder with the target's seeds. The files of both are
    removed at the end of the block."""
    target = load(name)
    with tempfile.TemporaryDirectory(prefix="hf-fuzz-") as folder:
        words, seeds = Path(folder, "words"), Path(folder, "seeds")
        words.write_text("".join(_quoted(word) for word in target.words))
        seeds.mkdir()
        for i, seed in enumerate(target.seeds):
            (seeds / str(i)).write_bytes(seed)
        command = [
            *(sys.executable, "-m", "tests.fuzz.worker", name, f"-max_len={target.max_bytes}"),
            *(f"-timeout={_LONGEST_INPUT_S}", f"-rss_limit_mb={_MOST_RSS_MIB}"),
            *([f"-dict={words}"] if target.words else []),  # libFuzzer refuses an empty dictionary
        ]
        yield command, seeds


def _quoted(word: str) -> str:
    """Return the line for this word in a libFuzzer dictionary."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"\n'


def _run(command: list[str], timeout_s: float | None) -> tuple[str, int]:
    """Run a worker; return its output and its exit code.

    :raises subprocess.TimeoutExpired: it took too long, and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="hf-fuzz-") as scratch:
        done = subprocess.run(
            command,
            cwd=ROOT,
            # PYTHONHASHSEED: with random hashes, the same inputs could reach other branches.
            env=os.environ | {"PYTHONHASHSEED": "0", "TMPDIR": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    return done.stdout.decode(errors="replace"), done.returncode


def _crashes(name: str) -> Iterator[Path]:
    for kind in ("crash", "timeout", "oom", "leak"):
        yield from CRASHES.glob(f"{name}-{kind}-*")


def _stat(output: str, pattern: str) -> int:
    """Return the last number that `pattern` finds in the output; 0 if there is none."""
    return int((re.findall(pattern, output, re.MULTILINE) or ["0"])[-1])
