"""The memory of a run by part: as estimated before it starts, and as measured in its first step."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class MemoryParts(BaseModel):
    """Bytes of one process. ``activations`` are those that a micro-batch keeps for its backward pass; null if unknown.

    Memory that libraries hold and fragmentation in allocators are not included.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    weights: int
    gradients: int
    optimizer: int
    activations: int | None = None


class MemoryEstimate(MemoryParts):
    """The estimate for each process; ``total`` is null if ``activations`` is.

    With ``fsdp_cpu_offload``, all of these are in the memory of the GPU, and ``host`` is the size of the shards of
    weights, gradients and optimizer state in the memory of the host; null otherwise.
    """

    total: int | None = None
    host: int | None = None


class MeasuredMemory(MemoryParts):
    """The memory in the first step of an earlier ``job`` with the same workload."""

    job: str
