"""Cleanup removes old run directories, those of deleted jobs, and unused cache entries."""

import os
import time
from pathlib import Path

from worker.artifacts.cleanup import sweep, sweep_deleted
from worker.artifacts.store import ArtifactStore
from zeta_core.contract.wire.run_directory import PUBLISHED_FILE

HOUR, DAY = 3600, 86_400


def make(path: Path, *, age_seconds: float, size: int = 10) -> Path:
    """A directory with one file of ``size`` bytes, last touched so long ago."""
    path.mkdir(parents=True)
    (path / "file").write_bytes(bytes(size))
    touched = time.time() - age_seconds
    os.utime(path, (touched, touched))
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_run_directories_are_kept_a_day_and_those_of_jobs_that_run_are_left_alone(tmp_path: Path) -> None:
    for job in ("job_ended", "job_running"):
        make(tmp_path / f"runs/{job}/attempt-1", age_seconds=25 * HOUR)
        make(tmp_path / f"runs/{job}/attempt-2", age_seconds=23 * HOUR)
    make(tmp_path / "runs/job_old/attempt-1", age_seconds=3 * DAY)
    os.utime(tmp_path / "runs/job_old", (0, 0))
    sweep(tmp_path, {"job_running"}, cache_max_bytes=10**6, need_space=False)
    assert names(tmp_path / "runs/job_ended") == ["attempt-2"]
    assert names(tmp_path / "runs/job_running") == ["attempt-1", "attempt-2"]
    assert names(tmp_path / "runs/job_old") == []  # gone with the next round, a day after it was emptied


def test_of_a_deleted_job_what_is_published_goes_soon_and_nothing_where_the_store_is_not_there(tmp_path: Path) -> None:
    root, store = tmp_path / "home", ArtifactStore(tmp_path / "artifacts")
    for job in ("job_deleted", "job_kept", "job_running", "job_untold"):
        make(root / f"runs/{job}/attempt-1", age_seconds=0)
        (root / f"runs/{job}/attempt-1" / PUBLISHED_FILE).touch()
    make(root / "runs/job_untold/attempt-2", age_seconds=0)
    sweep_deleted(root, {"job_running"}, store)  # a lost mount
    assert len(names(root / "runs")) == 4
    store.open_job("job_kept")  # an attempt without a journal
    sweep_deleted(root, {"job_running"}, store)
    assert names(root / "runs") == ["job_kept", "job_running", "job_untold"]
    assert names(root / "runs/job_untold") == ["attempt-2"]


def test_of_the_cache_goes_what_was_used_longest_ago_but_nothing_that_may_be_in_use(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for age in (0, 2 * HOUR, 3 * DAY, 6 * DAY, 8 * DAY):
        make(cache / f"{age:06}", age_seconds=age, size=1000)
    (cache / "file").write_bytes(bytes(10))

    sweep(tmp_path, (), cache_max_bytes=10**6, need_space=False)
    assert names(cache) == ["000000", "007200", "259200", "518400", "file"], "a week without use"
    sweep(tmp_path, (), cache_max_bytes=2500, need_space=False)
    assert names(cache) == ["000000", "007200", "file"], "beyond its limit"
    sweep(tmp_path, (), cache_max_bytes=2500, need_space=True)
    assert names(cache) == ["000000", "file"], "if space is needed"
    sweep(tmp_path, (), cache_max_bytes=0, need_space=True)
    assert names(cache) == ["000000", "file"]
