"""Detects runs and served models that exceed their memory limit, before the kernel kills another process instead.

With a limit (``ZETA_JOB_MEMORY_BYTES``, or ``ZETA_SERVE_MEMORY_BYTES`` for a served model), a run that exceeds it is
ended. Without one, a run may use all free memory: it is ended only while less than `RESERVE_SHARE` of the machine's
memory is free and it uses more than its slots' share. So one job can't take down the worker or another slot's job, and
large runs can use an idle machine.

Only anonymous and shared memory counts, because mapped files can be dropped from memory. Forked processes share pages,
so the cheap sum (``RssAnon``) is an upper bound; the exact count (``Pss``) is only taken when that exceeds the limit.
Between two checks, a run can exceed its limit for one tick. Memory is measured on Linux only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from zeta_core.system.oom_kills import group_files

FIND_SECONDS = 1.0  # between two searches for the run's processes, which scan all processes of the machine
EXACT_FACTOR = 20.0  # exact counts, which walk the page tables, take at most 1/20 of the time
RESERVE_SHARE = 0.03
_CHEAP = ("RssAnon", "RssShmem")
_EXACT = ("Pss_Anon", "Pss_Shmem")


@dataclass(frozen=True)
class Excess:
    """``is_share``: the limit is the slots' share of a machine that is running out of memory."""

    used_bytes: int
    limit_bytes: int
    is_share: bool

    @property
    def message(self) -> str:
        """The excess of a run, as a sentence."""
        return self.describe("The run", "ZETA_JOB_MEMORY_BYTES")

    def describe(self, subject: str, setting: str) -> str:
        """The excess as a sentence about ``subject``, whose limit is the setting with this name."""
        used = f"{subject} used {in_gib(self.used_bytes)} of memory"
        if self.is_share:
            return (
                f"{used}, more than its share of {in_gib(self.limit_bytes)}, and was ended because its machine was "
                f"running out of memory (set {setting} for a fixed limit)."
            )
        return f"{used}, more than its limit of {in_gib(self.limit_bytes)} ({setting}), and was ended."


class MemoryWatch:
    """Checks one run; called in every iteration of the supervising loop."""

    def __init__(
        self,
        find: Callable[[], Sequence[psutil.Process]],
        *,
        limit_bytes: int | None,
        share_bytes: int,
        free_bytes: Callable[[], int] | None = None,
        reserve_bytes: int | None = None,
    ) -> None:
        """``find`` returns the run's processes. ``share_bytes`` is the memory share of its slots."""
        self._find = find
        self._limit_bytes = limit_bytes
        self._share_bytes = share_bytes
        self._free_bytes = free_bytes or free_memory_bytes
        total = int(psutil.virtual_memory().total)
        self._reserve_bytes = int(RESERVE_SHARE * total) if reserve_bytes is None else reserve_bytes
        self._processes: Sequence[psutil.Process] = ()
        self._next_find = self._next_exact = 0.0

    def excess(self) -> Excess | None:
        """The used memory and the limit, if the run exceeds its limit; otherwise ``None``."""
        if sys.platform != "linux":
            return None
        now = time.monotonic()
        if now >= self._next_find:
            self._next_find = now + FIND_SECONDS
            self._processes = self._find()
        is_share = self._limit_bytes is None
        limit = self._share_bytes if self._limit_bytes is None else self._limit_bytes
        if now < self._next_exact or _sum(self._processes, "status", _CHEAP) <= limit:
            return None
        if is_share and self._free_bytes() >= self._reserve_bytes:
            return None
        used = _sum(self._processes, "smaps_rollup", _EXACT)
        done = time.monotonic()
        self._next_exact = done + EXACT_FACTOR * (done - now)
        return Excess(used, limit, is_share) if used > limit else None


def free_memory_bytes() -> int:
    """The memory still available to this control group; reclaimable file pages count as free."""
    free = int(psutil.virtual_memory().available)
    limits = zip(
        group_files("memory.max", "memory.limit_in_bytes"),
        group_files("memory.current", "memory.usage_in_bytes"),
        group_files("memory.stat", "memory.stat"),
        strict=True,
    )
    for limit, used, about in limits:
        try:
            words = about.read_text().split()
            reclaimable = int(words[words.index("inactive_file") + 1]) if "inactive_file" in words else 0
            free = min(free, int(limit.read_text()) - int(used.read_text()) + reclaimable)
        except (OSError, ValueError):
            continue  # no such group, or no limit
    return max(0, free)


def in_gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"


def _sum(processes: Iterable[psutil.Process], file: str, names: tuple[str, ...]) -> int:
    """The bytes in the lines ``NAME: KIBIBYTES kB`` of ``/proc/PID/FILE``; a file that can't be read counts as 0."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/{file}").read_text().splitlines()
        except OSError:
            continue
        parts = (line.split(":") for line in lines if line.startswith(names))
        total += sum(int(size.split()[0]) * 1024 for _, size in parts)
    return total
