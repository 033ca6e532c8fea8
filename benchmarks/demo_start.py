"""Time from a fresh clone to the first training line of `make demo`, relative to an earlier commit.

The peer is the last commit that installed everything with pip (2026-11-30). Both are cloned from this repository.
``not cached`` starts with empty caches of pip and uv, and ``cached`` with those that it has filled.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.result import ZETA, BenchmarkResult, Skipped, ratio_of_rounds
from benchmarks.workload import Size
from zeta_core.system.settings import process_environment

REPOSITORY = Path(__file__).resolve().parents[1]
PEER = "before set-up with uv"
PEER_COMMIT = "7139cc44b4cba15e03c0ca5a7de56ecad993f1c2"
CACHED_ROUNDS = 2
TARGETS = {"cached": 0.33, "not cached": 0.5}
STOP_SECONDS = 120
_TRAINING_LINE = re.compile(r"\bstep \d+/\d+")


def measure(size: Size) -> BenchmarkResult:
    if not size.large:
        raise Skipped("it sets up four environments, which takes many minutes; its small form would measure nothing")
    commits = {ZETA: resolve("HEAD"), PEER: resolve(PEER_COMMIT)}
    figures: dict[str, list[float]] = {f"{name}, {state}": [] for state in TARGETS for name in (ZETA, PEER)}
    with tempfile.TemporaryDirectory(prefix="zeta-demo-start-") as folder:
        for turn in range(CACHED_ROUNDS + 1):
            state = "cached" if turn else "not cached"
            for name in (ZETA, PEER)[:: 1 if turn % 2 == 0 else -1]:
                clone = Path(folder) / "clone"
                clone_commit(commits[name], clone)
                caches = Path(folder) / "caches" / ("zeta" if name == ZETA else "peer")
                figures[f"{name}, {state}"].append(seconds_to_first_line(clone, caches))
                shutil.rmtree(clone)
    ratios = {state: ratio_of_rounds(figures[f"{ZETA}, {state}"], figures[f"{PEER}, {state}"]) for state in TARGETS}
    return BenchmarkResult(
        title="From a fresh clone to the first training line of the demo, relative to the targets "
        + " and ".join(f"{target} ({state})" for state, target in TARGETS.items()),
        unit="s",
        figures=figures,
        ratio=max(ratios[state] / target for state, target in TARGETS.items()),
        target=1.0,
        target_is="maximum",
        notes="Ratio to the peer: " + ", ".join(f"{ratio:.2f} {state}" for state, ratio in ratios.items()),
        details={"ratios": ratios, "medians": {name: statistics.median(each) for name, each in figures.items()}},
    )


def resolve(commit: str) -> str:
    """The full name of a commit of this repository. Raises `Skipped` if it is missing."""
    command = ["git", "rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}"]
    try:
        return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped(f"it needs a clone of this repository with the commit {commit}: {error}") from error


def clone_commit(commit: str, folder: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", REPOSITORY, folder], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)


def seconds_to_first_line(clone: Path, caches: Path) -> float:
    """Run ``make demo`` until it prints the first step, and then interrupt it."""
    log: list[str] = []
    started = time.monotonic()
    with subprocess.Popen(
        ["make", "demo"],
        cwd=clone,
        env=_environment(caches),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.append(line)
                if _TRAINING_LINE.search(line):
                    return time.monotonic() - started
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=STOP_SECONDS)
    raise RuntimeError(f"`make demo` printed no step:\n{''.join(log[-50:])}")


def _environment(caches: Path) -> Mapping[str, str]:
    """This environment with other caches, and without the variables of the make that runs the benchmark."""
    own = {
        name: value
        for name, value in process_environment().items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    }
    return {
        **own,
        "PIP_CACHE_DIR": str(caches / "pip"),
        "UV_CACHE_DIR": str(caches / "uv"),
        "XDG_CACHE_HOME": str(caches),
    }
