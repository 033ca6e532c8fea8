"""A live worker in a scheduling pass: which of its slots suit a job, how many the job needs, and which it gets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.job.status import WaitingCode
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.wire.messages import Heartbeat


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


@dataclass
class Candidate:
    """A live worker in one scheduling pass.

    ``free`` are the slots that no job uses, without the ``num_reserved`` that are held back for a job ahead in the
    queue. ``free_background`` are the free background slots. ``unavailable`` is the reason why the worker accepts no
    jobs, if any.
    """

    heartbeat: Heartbeat
    free: list[int]
    unavailable: Wait | None = None
    free_background: list[int] = field(default_factory=list[int])
    is_reserved: bool = False  # for a job that needs several slots, even if none is free yet
    num_reserved: int = 0

    def has_gpus(self) -> bool:
        return any(slot.kind == "cuda" for slot in self.heartbeat.slots)

    def has_labels(self, resources: Resources) -> bool:
        return resources.labels.items() <= self.heartbeat.labels.items()

    def background_group(self) -> SlotGroup:
        return SlotGroup(self.heartbeat.cpu_kind, tuple(self.heartbeat.background_slots), 1, 0, is_background=True)

    def groups(self, resources: Resources) -> list[SlotGroup]:
        """The groups of slots that suit the job, whether or not they are large enough for it."""
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
            is_model = resources.gpu_model is None or _names(resources.gpu_model) <= _names(slot.name)
            is_large = slot.memory_bytes >= (resources.min_gpu_memory or 0)
            if slot.kind == "cuda" and is_model and is_large and not (several and slot.is_mig):
                yield slot

    def _one_per_gpu(self, slots: Sequence[DeviceReport]) -> tuple[DeviceReport, ...]:
        """One slot for each GPU, a free one if there is one."""
        by_device: dict[str, DeviceReport] = {}
        for slot in slots:
            device = slot.device or f"slot {slot.slot}"  # older workers don't report devices
            if device not in by_device or (by_device[device].slot not in self.free and slot.slot in self.free):
                by_device[device] = slot
        return tuple(by_device.values())

    def reports_kinds(self) -> bool:
        return self.heartbeat.cpu_kind is not None

    def take(self, slots: Sequence[int]) -> None:
        self.free = [slot for slot in self.free if slot not in slots]
        self.free_background = [slot for slot in self.free_background if slot not in slots]

    def reserve(self, slots: Sequence[int]) -> None:
        """Hold back these free slots, so that jobs further back in the queue don't get them."""
        self.take(slots)
        self.is_reserved, self.num_reserved = True, len(slots)


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
    """A worker that is large enough for the job, with the slots that suit it."""

    candidate: Candidate
    group: SlotGroup

    @property
    def worker(self) -> str:
        return self.candidate.heartbeat.worker

    @property
    def free(self) -> list[int]:
        return self.group.free(self.candidate.free_background if self.group.is_background else self.candidate.free)

    @property
    def num_missing(self) -> int:
        """The number of slots that must become free before the job can start."""
        return self.group.needed - len(self.free)

    def placement(self, other_nodes: tuple[Placement, ...] = ()) -> Placement:
        return Placement(self.candidate, self.free[: self.group.needed], self.group.gpus, other_nodes)


def _names(text: str) -> frozenset[str]:
    """The words of a GPU's name: ``A100`` is a word of ``NVIDIA A100-SXM4-80GB``, and ``A10`` is not."""
    return frozenset(word for word in re.split(r"[^0-9a-z.]+", text.lower()) if word)
