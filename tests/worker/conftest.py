"""An engine on SQLite, to which the tests add workers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.fleet import SmallFleet, small_fleet
from zeta_core.system.sandbox import SandboxSupport


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url) as fleet:
        fleet.start_engine()
        yield fleet


@pytest.fixture(scope="session")
def sandbox_support() -> SandboxSupport:
    """What confines runs on this machine; tests that need it are skipped without it."""
    code = "from dataclasses import astuple; from zeta_core.system.sandbox import probe; print(astuple(probe()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    support = SandboxSupport(*ast.literal_eval(found.stdout))
    if not support.is_available:
        pytest.skip(f"this machine has no sandbox: {support.problem}")
    return support
