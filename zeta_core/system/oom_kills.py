"""Detecting that the kernel killed a run because memory ran out, and reporting it.

A killed process cannot report the reason itself, so its parent compares the kernel's OOM kill counts from before and
after: the count of its control group, which is exact, or else the count of the machine. The latter may also increase
because of another program while the run is killed for another reason; the message leaves that open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zeta_core.contract.job.advice import suggest_less_memory
from zeta_core.contract.job.job import JobError, JobErrorEvidence
from zeta_core.contract.job.status import StatusReason
from zeta_core.contract.wire.run_directory import JOURNAL_FILE, MAX_LINE_BYTES, RUN_FILE

_COUNT_FILES = ("memory.events", "memory.oom_control")
_MEMORY_OPTIONS = ("batch_size", "seq_len", "use_activation_checkpointing")
MESSAGES = {
    "group": "The kernel killed the training process because memory ran out.",
    "machine": "The training process was killed by SIGKILL while the kernel killed processes because memory ran out.",
}


@dataclass(frozen=True)
class OomKills:
    """The number of processes that the kernel has killed because memory ran out; ``None`` if unknown."""

    group: int | None
    machine: int | None

    def increased_count(self, before: OomKills) -> Literal["group", "machine"] | None:
        """The count that has increased since ``before``, if any."""
        if self.group is not None and self.group > (before.group or 0):
            return "group"
        if self.machine is not None and self.machine > (before.machine or 0):
            return "machine"
        return None


def count_oom_kills() -> OomKills:
    """The current counts of this process's control group (version 1 or 2) and of the machine."""
    group = next((count for file in group_files(*_COUNT_FILES) if (count := _count_in(file)) is not None), None)
    return OomKills(group, _count_in(Path("/proc/vmstat")))


def oom_kill_error(run_dir: Path, before: OomKills, evidence: JobErrorEvidence) -> JobError | None:
    """The error of a run ended by SIGKILL, if memory ran out; ``before`` has the counts at its start."""
    counted_by = count_oom_kills().increased_count(before)
    if counted_by is None:
        return None
    evidence = evidence.model_copy(update={"oom_kills_counted_by": counted_by})
    return out_of_memory_error(run_dir, MESSAGES[counted_by], evidence)


def out_of_memory_error(run_dir: Path, message: str, evidence: JobErrorEvidence) -> JobError:
    """The error of a run that ran out of memory, with options that need less."""
    options, measured = _last_known(run_dir)
    suggestion = suggest_less_memory(options)
    known = {name: options[name] for name in _MEMORY_OPTIONS if name in options}
    return JobError(
        code=StatusReason.OUT_OF_MEMORY,
        message=message,
        hint=suggestion.hint,
        patch=suggestion.patch,
        evidence=evidence.model_copy(update={**known, **measured}),
    )


def _last_known(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved options of the run and its last memory measurements, read from its directory."""
    run_file = _json((run_dir / RUN_FILE).read_text()) if (run_dir / RUN_FILE).is_file() else {}
    options: dict[str, Any] = {**run_file.get("spec", {}), **_set_values(run_file.get("resolved_spec", {}))}
    measured: dict[str, Any] = {}
    for line in _journal(run_dir / JOURNAL_FILE):
        if line.get("type") == "status":
            options |= _set_values(line.get("resolved_spec") or {})
        elif line.get("code") == "micro_batch_halved":
            options |= line.get("patch") or {}
        elif line.get("type") == "progress":
            measured |= {name: line[name] for name in ("step", "memory", "memory_parts") if line.get(name) is not None}
    return options, measured


def _set_values(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _journal(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        with file.open("rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):  # the parts of a longer line are not JSON, and are ignored
                yield _json(line.decode("utf-8", "replace"))


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}  # an incomplete line
    return value if isinstance(value, dict) else {}


def group_files(version_2: str, version_1: str) -> Iterator[Path]:
    """The kernel's files about the memory of this control group, which is the root inside a container."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return  # not Linux
    for _, controllers, path in groups:
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), version_2
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), version_1
        else:
            continue
        yield from (root / path.lstrip("/") / name, root / name)


def _count_in(file: Path) -> int | None:
    try:
        words = file.read_text().split()
    except OSError:
        return None
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else None
