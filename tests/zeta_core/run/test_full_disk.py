"""Full disks and journals at their limit: nothing is half-written, and nothing is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.disks import SmallDisk, can_mount
from tests.zeta_core.run_directories import end_of, journal, make_run
from zeta_core.contract.job.events import JOURNAL_LINE, LogLine, ProgressLine, StatusLine, WarningLine
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import DISK_FULL_EXIT
from zeta_core.process import launch
from zeta_core.report.journal_writer import JournalWriter


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if not can_mount():
        pytest.skip("needs a small disk of its own, which this account cannot mount")
    made = SmallDisk(tmp_path / "disk", 16)
    yield made
    made.close()


def run_here(run_dir: Path) -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return launch.main(run_dir)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_that_does_not_fit_pauses_the_run_which_resumes_exactly(disk: SmallDisk, tmp_path: Path) -> None:
    output = disk.directory / "output"
    first = make_run(tmp_path / "here", 1, output_dir=str(output))
    (first / "stop").write_text(json.dumps({"action": "hand_back"}))
    assert run_here(first) == 0
    assert [path.name for path in output.glob("step-*")] == ["step-1"]

    disk.fill()
    with disk.ballast.open("rb+") as ballast:  # space for the first small files, but not for a checkpoint
        ballast.truncate(disk.ballast.stat().st_size - 2**19)
    full = make_run(tmp_path / "here", 2, output_dir=str(output), resume_from=str(output))
    assert run_here(full) == DISK_FULL_EXIT
    end = end_of(full)
    assert (end.status, end.reason) == ("paused", "disk_full")
    assert "step-2 needs" in (end.message or "")
    assert "MB are free" in (end.message or "")
    assert [path.name for path in output.glob("step-*")] == ["step-1"]

    disk.free()
    assert run_here(make_run(tmp_path / "here", 3, output_dir=str(output), resume_from=str(output))) == 0
    assert run_here(make_run(tmp_path / "straight")) == 0
    straight = tmp_path / "straight/output/final/model.safetensors"
    assert (output / "final/model.safetensors").read_bytes() == straight.read_bytes()


def test_a_run_that_cannot_write_its_journal_has_the_disk_full_exit_code(disk: SmallDisk) -> None:
    run_dir = make_run(disk.directory)
    disk.fill()
    assert run_here(run_dir) == DISK_FULL_EXIT
    assert journal(run_dir) == []


def test_a_line_that_does_not_fit_on_the_disk_is_removed_completely(disk: SmallDisk) -> None:
    file = disk.directory / "events.jsonl"
    lines = JournalWriter(file)
    lines.write(LogLine(message="the first"))
    disk.fill()
    with pytest.raises(OSError, match="No space left"):
        lines.write(LogLine(message="x" * 100_000))
    disk.free()
    lines.write(LogLine(message="the last"))
    lines.close()
    read = [JOURNAL_LINE.validate_json(line) for line in file.read_text().splitlines()]
    assert [line.message for line in read if isinstance(line, LogLine)] == ["the first", "the last"]


def test_a_journal_at_its_limit_warns_once_and_keeps_important_lines(tmp_path: Path) -> None:
    lines = JournalWriter(tmp_path / "events.jsonl", max_lines=3)
    for number in range(6):
        lines.write(LogLine(message=f"log {number}"))
    for step in range(5):
        lines.write(ProgressLine(phase="training", step=step))
    lines.write(StatusLine(status=JobStatus.SUCCEEDED))
    lines.close()
    read = [JOURNAL_LINE.validate_json(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line.type for line in read] == ["log"] * 3 + ["warning", "progress", "status"]
    assert isinstance(read[3], WarningLine)
    assert read[3].code == "journal_limit"
    assert "3 lines" in read[3].message
