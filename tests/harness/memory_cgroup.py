"""A cgroup with little memory, whose processes are killed when they exceed it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.waiting import wait_until


@contextmanager
def memory_cgroup(limit_bytes: int) -> Generator[Path]:
    """The ``cgroup.procs`` file to which a process writes its id to join. Skips if cgroups can't be created."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = {controllers: path.lstrip("/") for _, controllers, path in lines}
    if "memory" in paths:
        root, limit = Path("/sys/fs/cgroup/memory") / paths["memory"], "memory.limit_in_bytes"
    else:
        root, limit = Path("/sys/fs/cgroup") / paths.get("", ""), "memory.max"
    group = root / f"zeta-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no control group can be limited here: {error}")
        yield group / "cgroup.procs"
    finally:
        procs = group / "cgroup.procs"
        wait_until(lambda: not procs.read_text(), 60, "the control group to be empty")
        group.rmdir()
