"""The short form of ``make chaos``: a few jobs, the main faults once each, and a check of every promise."""

from pathlib import Path

import pytest

from tests.chaos.databases import SqliteDatabase
from tests.chaos.faults import FAULTS
from tests.chaos.planned_jobs import Kind
from tests.chaos.suite import FaultSuite

# Faults that last only seconds. The longer ones have separate tests, and `make chaos` includes all.
MAIN_FAULTS = (
    "training killed (kill -9)",
    "worker killed (kill -9) and restarted while its runs continue",
    "one node of several stopped (SIGSTOP)",
    "host lost, another one started",
    "network cut between a worker and Redis",
    "server killed (kill -9) and restarted",
    "Redis back without its data",
    "FLUSHALL",
    "database locked by another program",
    "disk of a worker full",
    "clock of a server or a host jumps",
)
SHARES: dict[Kind, int] = {"small": 65, "small, two nodes": 20, "real": 15}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_promise_holds_under_each_main_fault(tmp_path: Path) -> None:
    messages: list[str] = []
    database = SqliteDatabase(tmp_path / "zeta.db")
    suite = FaultSuite(tmp_path / "fleet", database, seed=4, num_jobs=15, shares=SHARES, log=messages.append)
    faults = [fault for fault in FAULTS if fault.name in MAIN_FAULTS]
    assert len(faults) == len(MAIN_FAULTS)
    breaches = suite.run(faults=faults, rounds=1)
    database.close()
    assert not breaches, "\n".join([*breaches, suite.report, *messages])
