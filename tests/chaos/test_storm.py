"""The short form of ``make chaos``: a handful of jobs, the main faults once each, every promise checked."""

from pathlib import Path

import pytest

from tests.chaos.databases import SqliteUnderFire
from tests.chaos.faults import FAULTS
from tests.chaos.game import Game
from tests.chaos.orders import Kind

# Those that are over in seconds; the longer ones have tests of their own, and all are in `make chaos`.
MAIN_FAULTS = (
    "training killed (kill -9)",
    "worker killed (kill -9), restarted while its trainings go on",
    "host gone for ever, another one started",
    "network cut between a worker and Redis",
    "server killed (kill -9), restarted",
    "Redis back without its data",
    "FLUSHALL",
    "database locked by another program",
    "disk of a worker full",
    "clock of a server or a host jumps",
)
SHARES: dict[Kind, int] = {"small": 85, "real": 15}


@pytest.mark.timeout(600)
def test_a_handful_of_jobs_keeps_every_promise_under_each_main_fault(tmp_path: Path) -> None:
    said: list[str] = []
    database = SqliteUnderFire(tmp_path / "zeta.db")
    game = Game(tmp_path / "fleet", database, seed=4, num_jobs=15, shares=SHARES, say=said.append)
    faults = [fault for fault in FAULTS if fault.name in MAIN_FAULTS]
    assert len(faults) == len(MAIN_FAULTS)
    breaches = game.play(faults=faults, rounds=1)
    database.close()
    assert not breaches, "\n".join([*breaches, game.report, *said])
