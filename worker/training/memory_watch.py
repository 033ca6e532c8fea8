"""Ends a training that takes more memory than it may, before the kernel kills something else for it.

With a limit (``ZETA_JOB_MEMORY_BYTES``) a training that exceeds it is ended. Without one it may take what is free: it
is ended only while the machine has less than `RESERVE_SHARE` left and it takes more than its slots' share, so that one
job cannot take down the worker or the job of another slot, and no large training is refused on a machine with room.

Counted is anonymous and shared memory, which cannot be written back to a file: mapped weights and data do not count.
Processes that were forked share pages, so the cheap sum (``RssAnon``) is an upper bound; only where that exceeds the
limit is each page counted once (``Pss``). Between two looks a training may allocate for a tick more than its limit.
Guaranteed on Linux alone: elsewhere nothing is counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from zeta_core.contract.oom import group_files

FIND_SECONDS = 1.0  # between two searches for the processes, which look at all of the machine's
EXACT_FACTOR = 20.0  # an exact count, which walks the page tables, takes at most one part in so many of the time
RESERVE_SHARE = 0.03
_CHEAP = ("RssAnon", "RssShmem")
_EXACT = ("Pss_Anon", "Pss_Shmem")


@dataclass(frozen=True)
class Excess:
    """``is_share``: the limit is the share of the slots, on a machine that runs out of memory."""

    used_bytes: int
    limit_bytes: int
    is_share: bool

    @property
    def message(self) -> str:
        used = f"The training used {in_gib(self.used_bytes)} of memory"
        if self.is_share:
            return (
                f"{used}, more than its share of {in_gib(self.limit_bytes)}, when its worker's machine ran out of "
                "memory, and was ended (ZETA_JOB_MEMORY_BYTES sets a limit of its own)."
            )
        return f"{used}, more than the limit of {in_gib(self.limit_bytes)} (ZETA_JOB_MEMORY_BYTES), and was ended."


class MemoryWatch:
    """Asked in every round of the supervising loop."""

    def __init__(
        self,
        find: Callable[[], Sequence[psutil.Process]],
        *,
        limit_bytes: int | None,
        share_bytes: int,
        free_bytes: Callable[[], int] | None = None,
        reserve_bytes: int | None = None,
    ) -> None:
        """``find``: the processes of the training. ``share_bytes``: the part of the machine that its slots are."""
        self._find = find
        self._limit_bytes = limit_bytes
        self._share_bytes = share_bytes
        self._free_bytes = free_bytes or free_memory_bytes
        total = int(psutil.virtual_memory().total)
        self._reserve_bytes = int(RESERVE_SHARE * total) if reserve_bytes is None else reserve_bytes
        self._processes: Sequence[psutil.Process] = ()
        self._next_find = self._next_exact = 0.0

    def excess(self) -> Excess | None:
        """By how much the training exceeds what it may take now; ``None`` while it does not."""
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
    """The memory that processes of this control group can still have; what can be written back to files is free."""
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
    """Bytes by the lines ``NAME: KIBIBYTES kB`` of ``/proc/PID/FILE``; what ended meanwhile, or is not ours, has 0."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/{file}").read_text().splitlines()
        except OSError:
            continue
        parts = (line.split(":") for line in lines if line.startswith(names))
        total += sum(int(size.split()[0]) * 1024 for _, size in parts)
    return total
