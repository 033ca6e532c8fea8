"""Detects that a run has stalled or exceeds its memory limit, and ends it."""

from __future__ import annotations

import time

from worker.attempt.final_line import failure_line, memory_limit_line
from worker.attempt.journal_reader import JournalReader
from worker.run.memory_watch import MemoryWatch
from worker.run.process_tree import ProcessTree
from worker.run.stacks import StackDumps
from worker.run.watchdog import Watchdog, measure_effort
from worker.settings import WorkerSettings
from zeta_core.contract.job.events import StatusLine, WarningLine
from zeta_core.contract.job.status import StatusReason

OTHER_NODES_SECONDS = 5.0  # for the workers of the other nodes to detect the same stall and to record their stacks


class RunMonitor:
    """Checks one run in every iteration of the supervising loop."""

    def __init__(self, tree: ProcessTree, settings: WorkerSettings, num_nodes: int, *, memory_share_bytes: int) -> None:
        """``memory_share_bytes`` is the share of the machine's memory that belongs to the attempt's slots."""
        self._num_nodes = num_nodes
        self.final_line: StatusLine | None = None  # why the monitor ended the run
        self.watchdog = Watchdog(
            factor=settings.stall_factor,
            floor_seconds=settings.stall_min_seconds,
            effort=lambda: measure_effort(tree.processes.alive()),
        )
        self._tree = tree
        self._memory = MemoryWatch(
            tree.processes.alive, limit_bytes=settings.job_memory_bytes, share_bytes=memory_share_bytes
        )
        self._stacks: StackDumps | None = None
        self._stalled_seconds = 0.0
        self._stalled_at = 0.0  # monotonic

    def check(self, journal: JournalReader) -> None:
        """End the run if it has stalled or exceeds its memory limit."""
        self._check_progress(journal)
        self._check_memory(journal)

    def _check_progress(self, journal: JournalReader) -> None:
        """End a stalled run, with its stacks in the log and in a warning.

        On several nodes, all ranks wait for the one that hangs, and lose their connections when one node is ended.
        """
        seconds = self.watchdog.stalled_for()
        if self._stacks is None:
            if seconds is not None and self._tree.stop_action is None and journal.last_line is None:
                self._stalled_seconds, self._stalled_at = seconds, time.monotonic()
                self._stacks = StackDumps(self._tree.processes)
        elif self.final_line is None and self._stacks.step() and not self._waits_for_other_nodes():
            message = (
                f"The run stalled: no step for {self._stalled_seconds:.0f} s, {self.watchdog.expectation()}. "
                f"{self._stacks.summary()} The attempt was ended."
            )
            stacks = self._stacks.text()
            journal.append(WarningLine(code=StatusReason.STALLED, message=message, stacks=stacks))
            rank = self._stacks.silent_rank
            self.final_line = failure_line(StatusReason.STALLED, message, log_tail=stacks, rank=rank)
            self._tree.kill()

    def _waits_for_other_nodes(self) -> bool:
        return self._num_nodes > 1 and time.monotonic() - self._stalled_at < OTHER_NODES_SECONDS

    def _check_memory(self, journal: JournalReader) -> None:
        if self.final_line is not None or journal.last_line is not None:
            return
        excess = self._memory.excess()
        if excess is not None:
            self._tree.kill()
            self.final_line = memory_limit_line(self._tree.directory, excess)
