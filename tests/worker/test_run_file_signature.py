"""The key that signs a worker's run files."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker.attempt.run_file_signature import KEY_FILE, read_signed, write_signed

NUM_ATTEMPTS = 16


def run_directories(root: Path) -> list[Path]:
    directories = [root / "runs" / f"job_{number}" / "attempt-1" for number in range(NUM_ATTEMPTS)]
    for directory in directories:
        directory.mkdir(parents=True)
    return directories


def test_attempts_that_are_prepared_at_once_share_one_complete_key(tmp_path: Path) -> None:
    directories = run_directories(tmp_path)
    with ThreadPoolExecutor(max_workers=NUM_ATTEMPTS) as threads:
        list(threads.map(write_signed, directories, [b"{}"] * NUM_ATTEMPTS))
    assert {read_signed(directory) for directory in directories} == {b"{}"}
    key = tmp_path / KEY_FILE
    assert len(key.read_bytes()) == 64
    assert key.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [KEY_FILE]


def test_a_changed_run_file_is_refused(tmp_path: Path) -> None:
    directory = run_directories(tmp_path)[0]
    write_signed(directory, b"{}")
    (directory / "run.json").write_bytes(b"{ }")
    with pytest.raises(ValueError, match=r"run\.json was changed"):
        read_signed(directory)
