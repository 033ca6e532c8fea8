"""A live worker in a scheduling pass: which of its slots suit a job, how many the job needs, and which it gets."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pydantic import JsonValue

from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.job.status import WaitingCode
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.wire.messages import Heartbeat

# A job that is stopped at its time limit first saves a checkpoint, and the server learns later that its slots are free.
BACKFILL_MARGIN_SECONDS = 120.0


@dataclass(frozen=True)
class Wait:
    """The reason why a job can't be dispatched now."""

    code: WaitingCode
    details: tuple[tuple[str, JsonValue], ...] = ()
    message: str | None = None


@dataclass(frozen=True)
class SlotGroup:
    """Equal slots of a worker that suit a job, busy ones included: GPUs of one model, or shares of its CPU.

    Each GPU is in it once: of several slots that share a GPU, a free one represents it. ``needed`` is the number of
    slots that the job takes. Background slots form a group of their own.
    """

    device_kind: str | None
    slots: tuple[DeviceReport, ...]
    needed: int
    gpus: int  # the GPUs among the needed slots: all or none
    is_background: bool = False

    @property
    def is_large_enough(self) -> bool:
        return len(self.slots) >= self.needed

    @property
    def problems(self) -> dict[str, str]:
        """Why GPUs of this group are not assigned, by the device."""
        return {slot.device or str(slot.slot): slot.problem for slot in self.slots if slot.problem is not None}

    def free(self, free: Sequence[int]) -> list[int]:
        """The slots among ``free`` that can be assigned."""
        return [slot.slot for slot in self.slots if slot.slot in free and slot.problem is None]


@dataclass(frozen=True)
class LiveWorker:
    """A live worker when a pass begins.

    ``free`` are the slots that no job uses, and ``free_background`` the background slots. ``seconds_left`` are the
    expected times until busy slots become free; it lacks those that can't be estimated. ``unavailable`` is the reason
    why the worker accepts no jobs, if any.
    """

    heartbeat: Heartbeat
    free: tuple[int, ...]
    unavailable: Wait | None = None
    free_background: tuple[int, ...] = ()
    seconds_left: Mapping[int, float] = field(default_factory=dict[int, float])


@dataclass
class Candidate:
    """A live worker, with the slots that are left after the jobs that a pass has considered so far.

    ``free`` excludes the ``reserved`` slots, which are held back for a job ahead in the queue that needs several. Their
    values are the seconds until that job can start; ``None`` if that is not known.
    """

    live: LiveWorker
    free: list[int]
    free_background: list[int]
    reserved: dict[int, float | None] = field(default_factory=dict[int, float | None])
    is_reserved: bool = False  # for a job that needs several slots, even if none is free yet
    _groups: dict[Resources, list[SlotGroup]] = field(
        default_factory=dict[Resources, list[SlotGroup]], repr=False, compare=False
    )

    @classmethod
    def of(cls, live: LiveWorker) -> Candidate:
        return cls(live, list(live.free), list(live.free_background))

    @property
    def heartbeat(self) -> Heartbeat:
        return self.live.heartbeat

    @property
    def unavailable(self) -> Wait | None:
        return self.live.unavailable

    @property
    def num_reserved(self) -> int:
        return len(self.reserved)

    @property
    def has_idle_slot(self) -> bool:
        """Whether any slot is idle, reserved or not."""
        return bool(self.free or self.free_background or self.reserved)

    def usable(self, max_seconds: float | None) -> list[int]:
        """The free slots, then the reserved ones that a job of at most this length leaves in time (backfilling)."""
        if max_seconds is None or not self.reserved:
            return self.free
        latest_end = max_seconds + BACKFILL_MARGIN_SECONDS
        return [*self.free, *(slot for slot, needed in self.reserved.items() if needed and latest_end <= needed)]

    @cached_property
    def shares_gpus(self) -> bool:
        """Whether several slots share a GPU."""
        devices = [slot.device for slot in self.heartbeat.slots if slot.device is not None]
        return len(set(devices)) < len(devices)

    def num_cached(self, inputs: Collection[str]) -> int:
        """How many of a job's inputs the worker probably holds in its caches."""
        return sum(key in inputs for key in self.heartbeat.cached_inputs) if inputs else 0

    def has_gpus(self) -> bool:
        return any(slot.kind == "cuda" for slot in self.heartbeat.slots)

    def has_labels(self, resources: Resources) -> bool:
        return resources.labels.items() <= self.heartbeat.labels.items()

    def background_group(self) -> SlotGroup:
        return SlotGroup(self.heartbeat.cpu_kind, tuple(self.heartbeat.background_slots), 1, 0, is_background=True)

    def groups(self, resources: Resources) -> list[SlotGroup]:
        """The groups of slots that suit the job, whether or not they are large enough for it.

        They are found once for all jobs with these resources, unless they depend on which slots are free.
        """
        known = self._groups.get(resources)
        if known is None:
            known = self._find_groups(resources)
            if not self.shares_gpus:
                self._groups[resources] = known
        return known

    def _find_groups(self, resources: Resources) -> list[SlotGroup]:
        if not self.has_labels(resources):
            return []
        if resources.gpus == 0 or not (resources.requires_gpus or self.has_gpus()):
            slots = tuple(self.heartbeat.slots)
            return [SlotGroup(self.heartbeat.cpu_kind, slots, min(resources.processes or 1, len(slots)), 0)]
        by_kind: dict[tuple[str, str | None], list[DeviceReport]] = {}
        for slot in self._gpu_slots(resources):
            by_kind.setdefault((slot.name, slot.device_kind), []).append(slot)
        groups = [self._gpu_group(kind, slots, resources) for (_, kind), slots in by_kind.items()]
        if resources.gpus == "all":
            groups = sorted(groups, key=lambda group: group.needed)[-1:]
        return groups

    def _gpu_group(self, kind: str | None, slots: Sequence[DeviceReport], resources: Resources) -> SlotGroup:
        distinct = self._one_per_gpu(slots)
        needed = resources.gpus
        if needed is None:
            needed = resources.processes or 1
        elif needed == "all":  # of those that can be assigned; a job waits if there is none
            needed = max(1, sum(slot.problem is None for slot in distinct))
        return SlotGroup(kind, distinct, needed, needed)

    def _gpu_slots(self, resources: Resources) -> Iterable[DeviceReport]:
        several = resources.gpus == "all" or max(resources.gpus or 0, resources.processes or 0) > 1
        for slot in self.heartbeat.slots:
            is_model = resources.gpu_model is None or _words(resources.gpu_model) <= _words(slot.name)
            is_large = slot.memory_bytes >= (resources.min_gpu_memory or 0)
            if slot.kind == "cuda" and is_model and is_large and not (several and slot.is_mig):
                yield slot

    def _one_per_gpu(self, slots: Sequence[DeviceReport]) -> tuple[DeviceReport, ...]:
        """One slot for each GPU, a free one if there is one."""
        by_device: dict[str, DeviceReport] = {}
        for slot in slots:
            device = slot.device or f"slot {slot.slot}"  # older workers don't report devices
            if device not in by_device or (not self._is_idle(by_device[device]) and self._is_idle(slot)):
                by_device[device] = slot
        return tuple(by_device.values())

    def reports_kinds(self) -> bool:
        return self.heartbeat.cpu_kind is not None

    def _is_idle(self, slot: DeviceReport) -> bool:
        return slot.slot in self.free or slot.slot in self.reserved

    def take(self, slots: Collection[int]) -> None:
        self.free = [slot for slot in self.free if slot not in slots]
        self.free_background = [slot for slot in self.free_background if slot not in slots]
        self.reserved = {slot: needed for slot, needed in self.reserved.items() if slot not in slots}

    def reserve(self, slots: Collection[int], seconds: float | None) -> None:
        """Hold back these free slots for a job that can start after ``seconds``; ``None`` if that is not known."""
        self.take(slots)
        self.is_reserved, self.reserved = True, dict.fromkeys(slots, seconds)


@dataclass(frozen=True)
class Placement:
    """The worker and the slots that a job gets, and how many of the slots it uses as GPUs: all or none.

    ``other_nodes`` are the further workers of a job that needs several, in the order of their node ranks.
    """

    candidate: Candidate
    slots: list[int]
    gpus: int
    other_nodes: tuple[Placement, ...] = ()

    @property
    def nodes(self) -> tuple[Placement, ...]:
        """Each worker by node rank; this one is node 0."""
        return self, *self.other_nodes

    @property
    def total_gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def take(self) -> None:
        """Take the slots from all candidates, because the job is dispatched to them."""
        for node in self.nodes:
            node.candidate.take(node.slots)


@dataclass(frozen=True)
class Option:
    """A worker that is large enough for the job, with the slots that suit it.

    ``max_seconds`` is the length of the job if it has a time limit.
    """

    candidate: Candidate
    group: SlotGroup
    max_seconds: float | None = None

    @property
    def worker(self) -> str:
        return self.candidate.heartbeat.worker

    @property
    def free(self) -> list[int]:
        """The slots that the job may take now, those that are reserved for another one last."""
        if self.group.is_background:
            return self.group.free(self.candidate.free_background)
        reserved, usable = self.candidate.reserved, self.group.free(self.candidate.usable(self.max_seconds))
        return sorted(usable, key=reserved.__contains__) if reserved else usable

    @property
    def num_missing(self) -> int:
        """The number of slots that must become free before the job can start."""
        return self.group.needed - len(self.free)

    def rank(self, device_kind: str | None, inputs: Collection[str]) -> tuple[float, ...]:
        """The largest rank is the best worker for a job among those with enough free slots.

        In this order: the device kind of its earlier attempts; slots that aren't reserved; a job without GPUs leaves
        workers with GPUs alone; inputs in the caches. Then GPUs are packed, so that whole workers stay free for large
        jobs: the worker with the fewest free slots wins. Jobs on CPUs are spread, because the processes on one
        machine share its memory bandwidth.
        """
        num_free = len(self.candidate.free)
        return (
            device_kind is not None and self.group.device_kind == device_kind,
            self.group.needed <= num_free,
            self.group.gpus > 0 or not self.candidate.has_gpus(),
            self.candidate.num_cached(inputs),
            -num_free if self.group.gpus else num_free,
        )

    @property
    def seconds_until_free(self) -> float | None:
        """The time until enough slots are free if all jobs end as expected; ``None`` if that can't be estimated."""
        num_missing = self.group.needed - len(self.group.free(self.candidate.free))
        if num_missing <= 0:
            return 0.0
        known = sorted(seconds for seconds in self._seconds_left if seconds is not None)
        return known[num_missing - 1] if len(known) >= num_missing else None

    @property
    def seconds_to_backfill(self) -> float | None:
        """As `seconds_until_free`, but ``None`` if slots are missing and the end of any job on them can't be estimated.

        Such a job may end at any moment, so another one must not take the slots that are reserved meanwhile.
        """
        seconds = self.seconds_until_free
        return None if seconds != 0 and None in self._seconds_left else seconds

    @property
    def _seconds_left(self) -> list[float | None]:
        """The expected time until each busy slot becomes free."""
        idle, left = {*self.candidate.free, *self.candidate.reserved}, self.candidate.live.seconds_left
        busy = [slot for slot in self.group.slots if slot.slot not in idle and slot.problem is None]
        return [left.get(slot.slot) for slot in busy]

    def placement(self, other_nodes: tuple[Placement, ...] = ()) -> Placement:
        return Placement(self.candidate, self.free[: self.group.needed], self.group.gpus, other_nodes)


def _words(text: str) -> frozenset[str]:
    """The words of a GPU's name: ``A100`` is a word of ``NVIDIA A100-SXM4-80GB``, and ``A10`` is not."""
    return frozenset(word for word in re.split(r"[^0-9a-z.]+", text.lower()) if word)
