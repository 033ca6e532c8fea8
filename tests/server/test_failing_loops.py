"""A server exits with status 70 if a loop keeps failing because of a defect, but not because of an outage."""

import subprocess
import sys

import pytest

from tests.harness.fleet import REPOSITORY
from tests.harness.service import clean_environment
from zeta_core.system.outage import EXIT_STATUS

# A loop that fails with the exception in the argument. The process ends with status 0 after four failures, which take
# longer than the limit for defects.
PROGRAM = """
import asyncio, logging, sys
from server.engine.loops import BackgroundLoops, Pace
from zeta_core.system.redis_access import RedisUnavailable

logging.basicConfig(level=logging.INFO)
case, num_passes = sys.argv[1], 0

async def main():
    loops, done = BackgroundLoops(give_up_seconds=0.3), asyncio.Event()

    async def one_pass():
        global num_passes
        num_passes += 1
        if num_passes > 4: done.set()
        if case == "defect": raise KeyError("x")
        if case == "hang": await asyncio.Event().wait()
        if case == "alternating" and num_passes % 2: raise KeyError("x")
        raise RedisUnavailable("connection refused")

    loops.start("the loop", one_pass, Pace(), limit_seconds=0.05)
    await done.wait()
    await loops.stop()

asyncio.run(main())
"""


def run_case(case: str) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", PROGRAM, case]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("case", "error"), [("defect", "KeyError"), ("hang", "PassTimedOut")])
def test_a_loop_that_keeps_failing_ends_the_server(case: str, error: str) -> None:
    done = run_case(case)
    assert done.returncode == EXIT_STATUS, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("CRITICAL"), done.stderr
    assert "Loop 'the loop' has been failing since" in last
    assert error in last


@pytest.mark.extended
@pytest.mark.parametrize("case", ["outage", "alternating"])
def test_an_outage_does_not_end_the_server(case: str) -> None:
    done = run_case(case)
    assert done.returncode == 0, done.stderr
