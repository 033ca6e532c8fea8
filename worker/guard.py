"""Ends a worker's process when waiting would not help, so that its supervisor starts a new one, which adopts its runs.

That is the case if a loop or step keeps failing because of a defect, or if it hangs. Time is counted in ticks of the
guard's own thread, because a process that was frozen (SIGSTOP, a paused container) must not be ended when it continues.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from worker.outage import Loop, Outage
from zeta_core.system.outage import GIVE_UP_SECONDS, give_up


@dataclass(frozen=True)
class Limits:
    give_up_seconds: float = GIVE_UP_SECONDS  # of failing because of a defect
    hang_seconds: float = 300.0  # far above the time of any pass
    tick_seconds: float = 1.0


class Guard:
    def __init__(
        self, loops: Sequence[Loop], steps: Sequence[Outage], main_progress: Callable[[], int], limits: Limits
    ) -> None:
        """``steps`` are those of the main thread, and ``main_progress`` grows unless that thread hangs."""
        self._loops, self._steps, self._main_progress = loops, steps, main_progress
        self._limits = limits
        self._seen: dict[str, float] = {}  # the value at the last tick
        self._num_ticks: dict[str, int] = {}  # how many ticks the value has not changed
        self._loop = Loop("guard", "The worker's state can't be checked", self._one_pass)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        self._loop.stop(2 * self._limits.tick_seconds)

    def _one_pass(self) -> None:
        self._loop.stopped.wait(self._limits.tick_seconds)
        running = [loop for loop in self._loops if not loop.stopped.is_set()]
        for outage in (*self._steps, *(loop.outage for loop in running)):
            if self._unchanged_seconds(f"{outage.name} fails", outage.defect_since) >= self._limits.give_up_seconds:
                give_up(f"{outage.name} has been failing for {self._limits.give_up_seconds:g} s: {outage.trouble}.")
        progress = {"main": self._main_progress(), **{loop.name: loop.progress for loop in running}}
        for name, value in progress.items():
            if self._unchanged_seconds(f"{name} hangs", value) >= self._limits.hang_seconds:
                faulthandler.dump_traceback(all_threads=True)
                give_up(f"The thread {name} has been hanging for {self._limits.hang_seconds:g} s; see its stack above.")

    def _unchanged_seconds(self, key: str, value: float | None) -> float:
        """For how long the value has been the same; 0 for ``None``."""
        if value is None:
            self._seen.pop(key, None)
            return 0.0
        self._num_ticks[key] = self._num_ticks[key] + 1 if self._seen.get(key) == value else 0
        self._seen[key] = value
        return self._num_ticks[key] * self._limits.tick_seconds
