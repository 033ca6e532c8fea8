"""Reading a journal while it grows, and repairing it after its writer was killed."""

import tracemalloc
from pathlib import Path

import pytest

from worker.attempt.journal_reader import JournalReader
from zeta_core.contract.job.events import StatusLine
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import MAX_LINE_BYTES

PROGRESS = b'{"type": "progress", "phase": "training", "step": 1}\n'
SUCCEEDED = b'{"type": "status", "status": "succeeded"}\n'


@pytest.fixture
def checkpoints() -> list[tuple[int, str]]:
    return []


@pytest.fixture
def journal(tmp_path: Path, checkpoints: list[tuple[int, str]]) -> JournalReader:
    return JournalReader(tmp_path / "events.jsonl", lambda number, name: checkpoints.append((number, name)))


def test_only_complete_lines_are_counted_and_any_can_be_read_again(journal: JournalReader, tmp_path: Path) -> None:
    journal.scan()
    assert (len(journal), journal.has_steps) == (0, False)
    file = tmp_path / "events.jsonl"
    file.write_bytes(PROGRESS + PROGRESS[:20])
    journal.scan()
    assert (len(journal), journal.has_steps) == (1, True)
    file.write_bytes(PROGRESS + PROGRESS.replace(b"1", b"2") + b"not json\n[1]\n")
    journal.scan()
    assert len(journal) == 4
    assert [journal.read(number).get("step") for number in (1, 2, 1)] == [1, 2, 1]
    assert [journal.read(number)["code"] for number in (3, 4)] == ["unreadable_line", "unreadable_line"]


def test_the_first_final_status_is_the_last_line_of_a_journal(journal: JournalReader, tmp_path: Path) -> None:
    running = b'{"type": "status", "status": "running"}\n'
    (tmp_path / "events.jsonl").write_bytes(running + SUCCEEDED + PROGRESS)
    journal.scan()
    assert (len(journal), journal.last_line, journal.last_status) == (2, 2, JobStatus.SUCCEEDED)


def test_a_log_line_that_contains_a_status_does_not_end_the_journal(journal: JournalReader, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"type": "log", "message": "{\\"type\\": \\"status\\"}", "status": 1}\n')
    journal.scan()
    assert journal.last_line is None


def test_each_checkpoint_is_reported_once_with_its_line_number(
    journal: JournalReader, tmp_path: Path, checkpoints: list[tuple[int, str]]
) -> None:
    (tmp_path / "events.jsonl").write_bytes(PROGRESS + b'{"type": "checkpoint", "name": "step-1", "step": 1}\n')
    journal.scan()
    journal.scan()
    assert checkpoints == [(2, "step-1")]


@pytest.mark.parametrize("incomplete", [b"", b'{"type": "progr', b"x" * 3_000_000])
def test_an_incomplete_last_line_is_removed_before_the_worker_appends(
    journal: JournalReader, tmp_path: Path, incomplete: bytes
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(PROGRESS + incomplete)
    journal.scan()
    journal.cut_torn_line()
    assert file.read_bytes() == PROGRESS
    journal.append(StatusLine(status=JobStatus.FAILED))
    journal.scan()
    assert (len(journal), journal.last_status) == (2, JobStatus.FAILED)


def test_a_missing_journal_and_one_incomplete_line_are_repaired(journal: JournalReader, tmp_path: Path) -> None:
    journal.cut_torn_line()
    assert not (tmp_path / "events.jsonl").exists()
    (tmp_path / "events.jsonl").write_bytes(b"torn")
    journal.cut_torn_line()
    assert (tmp_path / "events.jsonl").read_bytes() == b""


def test_a_line_that_is_too_long_is_replaced_and_later_lines_are_read(journal: JournalReader, tmp_path: Path) -> None:
    longest = b'{"type": "log", "message": "' + b"a" * (MAX_LINE_BYTES - 40) + b'"}\n'
    with (tmp_path / "events.jsonl").open("ab", buffering=0) as file:
        file.write(PROGRESS + longest + b'{"type": "log", "message": "')
        for _ in range(40):
            file.write(b"a" * 2**20)
            journal.scan()
        file.write(b'"}\n' + PROGRESS.replace(b"1", b"2") + SUCCEEDED)
    while journal.last_line is None:
        journal.scan()
    assert (len(journal), journal.last_status) == (5, JobStatus.SUCCEEDED)
    assert len(journal.read(2)["message"]) == MAX_LINE_BYTES - 40
    assert journal.read(3)["code"] == "line_too_long"
    assert journal.read(4)["step"] == 2


def test_an_endless_line_is_not_kept_in_memory(journal: JournalReader, tmp_path: Path) -> None:
    with (tmp_path / "events.jsonl").open("wb") as file:
        file.truncate(300 * 2**20)
    tracemalloc.start()
    try:
        for _ in range(100):
            journal.scan()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(journal) == 0
    assert peak < 4 * MAX_LINE_BYTES
