"""The checks of the promises work: after one successful job, each kind of damage fails its check."""

import json
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.chaos.databases import SqliteDatabase
from tests.chaos.fleet import Fleet, running_fleet
from tests.chaos.planned_jobs import PlannedJob, spec_of
from tests.chaos.promises import PROMISES, Evidence
from tests.chaos.training import WITNESS_DIRECTORY
from tests.chaos.users import Users
from tests.harness.waiting import wait_until
from zeta_core.contract.wire.run_directory import LOG_FILE, checkpoint_key


class Case:
    """One ended job; each kind of damage is undone when its block ends."""

    def __init__(self, fleet: Fleet, database_file: Path) -> None:
        self._fleet = fleet
        self._users = Users(fleet.servers)
        self._database_file = database_file
        self._users.serve(
            [PlannedJob("only", "small", spec_of("small", "", steps=12, seconds_per_step=0.01))], at_once=1
        )
        assert self._users.all_ended.wait(120), fleet.logs()
        (job_id,) = self._users.accepted
        wait_until(lambda: not self.broken(), 60, "every promise to be kept")
        self.witness = fleet.folder / WITNESS_DIRECTORY / f"{job_id}.jsonl"
        self.final = fleet.store / checkpoint_key(job_id, "final")
        (self.log,) = [directory / LOG_FILE for directory in fleet.run_directories()]

    def broken(self) -> list[int]:
        """The numbers of the broken promises."""
        evidence = Evidence(self._fleet, self._users, recovery_seconds=2)
        return [number for number, promise in enumerate(PROMISES, 1) if any(promise.breaches(evidence))]

    @contextmanager
    def database_after(self, statement: str) -> Generator[None]:
        undamaged, present = sqlite3.connect(":memory:"), sqlite3.connect(self._database_file)
        present.backup(undamaged)
        present.execute(statement)
        present.commit()
        yield
        undamaged.backup(present)
        for connection in (undamaged, present):
            connection.close()

    @contextmanager
    def server_stopped(self) -> Generator[None]:
        (server,) = self._fleet.servers
        server.end()
        yield
        server.start()

    @contextmanager
    def file_with(self, file: Path, more: str) -> Generator[None]:
        undamaged = file.read_bytes()
        file.write_bytes(undamaged + more.encode())
        yield
        file.write_bytes(undamaged)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("case")
    (folder / "fleet").mkdir()
    database = SqliteDatabase(folder / "zeta.db")
    with running_fleet(folder / "fleet", database, num_hosts=1) as fleet:
        yield Case(fleet, folder / "zeta.db")
    database.close()


def test_a_wrong_end_reason_is_detected(case: Case) -> None:
    with case.database_after("UPDATE jobs SET status_reason = 'cancelled_by_user'"):
        assert case.broken() == [1]


def test_two_attempts_at_once_are_detected(case: Case) -> None:
    start = {"attempt": 2, "node": 0, "others_alive": [{"attempt": 1, "pid": 1}]}
    with case.file_with(case.witness, json.dumps(start) + "\n"):
        assert case.broken() == [2]


def test_different_weights_are_detected(case: Case) -> None:
    with case.file_with(case.final / "model.safetensors", "x"):
        assert case.broken() == [3, 5]  # the file also differs from its manifest


def test_missing_or_changed_events_and_logs_are_detected(case: Case) -> None:
    with case.database_after("DELETE FROM events WHERE seq = 5"):
        assert case.broken() == [4]
    with case.database_after("UPDATE events SET fields = '{\"step\": 99}' WHERE seq = 5"):
        assert case.broken() == [4]
    with case.file_with(case.log, "an additional line\n"):
        assert case.broken() == [4]


def test_an_incomplete_checkpoint_is_detected(case: Case) -> None:
    half = case.final.with_name(".step-99.partial")

    def is_detected() -> bool:
        half.mkdir(exist_ok=True)  # the server removes it if it has not yet cleaned up after the job's end
        return case.broken() == [5]

    wait_until(is_detected, 30, "the incomplete checkpoint to be detected")
    with suppress(FileNotFoundError):
        half.rmdir()


@pytest.mark.slow
def test_an_unresponsive_server_is_detected(case: Case) -> None:
    with case.server_stopped():
        assert case.broken() == [6]
