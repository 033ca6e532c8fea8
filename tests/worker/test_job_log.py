"""A job's log in the store: it is copied while it grows, limited in size, and continued after a worker restart."""

from pathlib import Path, PurePosixPath

import pytest

from worker.artifacts.job_log import CUT_LINE, TAIL_BYTES, JobLog
from zeta_core.system.artifact_store.folder import FolderStore


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "train.log"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "attempt-1.log"


def job_log(local: Path, stored: Path, *, max_bytes: int = 10**6) -> JobLog:
    """A new object each time, as after a restart."""
    return JobLog(local, FolderStore(stored.parent), PurePosixPath(stored.name), max_bytes=max_bytes)


def test_copying_a_log_continues_after_a_restart(local: Path, stored: Path) -> None:
    job_log(local, stored).copy()
    assert not stored.exists()
    for text in ("one\n", "one\ntwo", "one\ntwo", "one\ntwo\nthree\n"):
        local.write_text(text)
        job_log(local, stored).copy()
        assert stored.read_text() == text
    job_log(local, stored).complete()
    job_log(local, stored).complete()
    assert stored.read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("rounds", [1, 6])
def test_a_log_beyond_the_limit_keeps_its_beginning_and_its_end(local: Path, stored: Path, rounds: int) -> None:
    limit = 2 * TAIL_BYTES
    number, written = 0, b""
    for _ in range(rounds):
        lines = b"".join(f"line {line:09}\n".encode() for line in range(number, number + TAIL_BYTES // 3))
        number += TAIL_BYTES // 3
        with local.open("ab") as log:
            log.write(lines)
        written += lines
        job_log(local, stored, max_bytes=limit).copy()
        assert local.stat().st_size < 5 * TAIL_BYTES
    job_log(local, stored, max_bytes=limit).complete()
    job_log(local, stored, max_bytes=limit).complete()
    begin, cut, end = stored.read_bytes().partition(CUT_LINE)
    assert (begin, cut) == (written[:limit], CUT_LINE)
    assert end == written[-TAIL_BYTES:]


def test_a_log_that_is_slightly_too_long_is_kept_completely(local: Path, stored: Path) -> None:
    written = b"x" * TAIL_BYTES + b"the end"
    local.write_bytes(written)
    JobLog(
        local, FolderStore(stored.parent), PurePosixPath(stored.name), max_bytes=1
    ).complete()  # the end of the log is stored even beyond the limit
    assert stored.read_bytes() == b"x" * TAIL_BYTES + CUT_LINE + b"the end"


def test_earlier_attempts_count_towards_the_log_limit_of_their_job(local: Path, stored: Path) -> None:
    stored.parent.mkdir(parents=True)
    stored.with_name("attempt-0.log").write_bytes(b"y" * TAIL_BYTES)
    local.write_bytes(b"x" * 4 * TAIL_BYTES)
    job_log(local, stored, max_bytes=3 * TAIL_BYTES).copy()
    assert stored.read_bytes() == b"x" * 2 * TAIL_BYTES + CUT_LINE
