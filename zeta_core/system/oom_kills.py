"""A training that the kernel killed because memory ran out: how that is known, and what to say of it.

Such a process leaves no word of its own, so those who started it look at what the kernel counts: the kills within its
control group (which no one else's can be taken for) or, where that tells nothing, those on the whole machine. A kill by
somebody else that falls together with one of another program is then taken for ours, and the message says so.
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

_COUNTS = ("memory.events", "memory.oom_control")
_ABOUT_MEMORY = ("batch_size", "seq_len", "use_activation_checkpointing")
MESSAGES = {
    "group": "The kernel killed the training process because memory ran out.",
    "machine": "The training process was killed by SIGKILL while the kernel killed processes because memory ran out.",
}


@dataclass(frozen=True)
class OomKills:
    """How many processes the kernel killed for memory so far; ``None`` where it does not say."""

    group: int | None
    machine: int | None

    def since(self, before: OomKills) -> Literal["group", "machine"] | None:
        """Where there was another one since ``before``."""
        if self.group is not None and self.group > (before.group or 0):
            return "group"
        if self.machine is not None and self.machine > (before.machine or 0):
            return "machine"
        return None


def count_oom_kills() -> OomKills:
    """The counts now: of this process' own control group, of either version, and of the machine."""
    group = next((count for file in group_files(*_COUNTS) if (count := _count_in(file)) is not None), None)
    return OomKills(group, _count_in(Path("/proc/vmstat")))


def oom_kill_error(run_dir: Path, before: OomKills, evidence: JobErrorEvidence) -> JobError | None:
    """What to say of a training that SIGKILL ended, if memory was why; ``before`` was counted when it was started."""
    now = count_oom_kills()
    where = now.since(before)
    if where is None:
        return None
    return out_of_memory_error(run_dir, MESSAGES[where], evidence.model_copy(update={"oom_kills_counted_by": where}))


def out_of_memory_error(run_dir: Path, message: str, evidence: JobErrorEvidence) -> JobError:
    """The error of a training that was ended for its memory, with the options that take less."""
    options, figures = _last_known(run_dir)
    cure = suggest_less_memory(options)
    known = {name: options[name] for name in _ABOUT_MEMORY if name in options}
    return JobError(
        code=StatusReason.OUT_OF_MEMORY,
        message=message,
        hint=cure.hint,
        patch=cure.patch,
        evidence=evidence.model_copy(update={**known, **figures}),
    )


def _last_known(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options as the run resolved them, and the last figures of its memory, from the files of its directory."""
    order = _json((run_dir / RUN_FILE).read_text()) if (run_dir / RUN_FILE).is_file() else {}
    options: dict[str, Any] = {**order.get("spec", {}), **_known(order.get("resolved_spec", {}))}
    figures: dict[str, Any] = {}
    for line in _journal(run_dir / JOURNAL_FILE):
        if line.get("type") == "status":
            options |= _known(line.get("resolved_spec") or {})
        elif line.get("code") == "micro_batch_halved":
            options |= line.get("patch") or {}
        elif line.get("type") == "progress":
            figures |= {name: line[name] for name in ("step", "memory", "memory_parts") if line.get(name) is not None}
    return options, figures


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _journal(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        with file.open("rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):  # of a longer one the parts are no JSON
                yield _json(line.decode("utf-8", "replace"))


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}  # the line that it was killed in
    return value if isinstance(value, dict) else {}


def group_files(version_2: str, version_1: str) -> Iterator[Path]:
    """Where the kernel may tell about the memory of this control group: a container sees its own as the root."""
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
