"""Rejecting runs that can't fit in memory, with settings that reduce it.

A run is rejected only if the lower bound of `minimum_memory` exceeds the capacity: before its model is downloaded, read
or built (`check_before_loading`, where nothing is known about the data), and before its first step
(`check_before_training`). Otherwise, Linux would kill an oversized run on a CPU without a message. If a run exhausts
its memory later, `zeta_core.train.out_of_memory` reports the memory of each part.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import nn

from zeta_core.contract.job.advice import NO_LESS_MEMORY, Patch, suggest_less_memory
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import ConfigModel, FileModel, JobModel
from zeta_core.data.sources import SourceLocations
from zeta_core.environment import total_memory_bytes
from zeta_core.failures import OutOfMemory
from zeta_core.memory.estimate import (
    FLOAT32_BYTES,
    FSDP_STAGE,
    MemoryByPart,
    format_bytes,
    minimum_memory,
    parts_per_process,
    shard_bytes,
)
from zeta_core.model.freezing import freeze
from zeta_core.model.gguf import is_gguf
from zeta_core.model.inspection import plan_inputs_without_data
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.preparation import trained_precision
from zeta_core.model.sources import locate_model
from zeta_core.plan import Plan, decide_plan

QUANTIZED_BYTES = 0.5  # per weight in 4 bits; not all weights are quantized
LORA_HINT = (
    "With the patch, an adapter is trained instead of all weights, and the minimum fits; activations are not included."
)


def memory_capacity(plan: Plan) -> int:
    """The memory that one process can have, in bytes: its GPU's, or its share of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total_memory_bytes() // plan.world_size


def check_before_loading(
    model: object,
    options: TrainerOptions,
    locations: SourceLocations,
    cache: Path,
    *,
    world_size: int,
    capacity: int | None = None,
) -> None:
    """Raise `OutOfMemory` if the lower bound exceeds the memory that a process can have (``capacity``, in bytes).

    Raises `InvalidModel` if the model's config is not available, as loading the model would.
    """
    if not isinstance(model, ConfigModel | JobModel | FileModel | str | Path):
        return
    located = locate_model(model, replace(locations, fetch_weights=False), cache)
    if located.needs_weights or (located.directory is not None and is_gguf(located.directory)):
        return
    with torch.device("meta"):
        model = located.build()
    plan_inputs = plan_inputs_without_data(model, pretrained=located.pretrained, world_size=world_size)
    plan = decide_plan(options, plan_inputs, None)
    capacity = capacity or memory_capacity(plan)
    minimum = _minimum_with_adapter(model, located, plan) if plan.lora is not None else _minimum(model, plan)
    if minimum.total <= capacity:
        return
    may_adapt = located.pretrained and plan.lora is None and not plan.freeze
    if may_adapt and _minimum_with_adapter(model, located, plan).total <= capacity:
        raise _error(minimum, capacity, hint=LORA_HINT, patch={"lora": {}})
    raise _error(minimum, capacity, hint=NO_LESS_MEMORY)


def _minimum(model: nn.Module, plan: Plan) -> MemoryByPart:
    """`minimum_memory` if every weight that is not frozen is trained, without any data."""
    model.to(trained_precision(plan))
    freeze(model, plan.freeze)
    return minimum_memory(model, plan, mean_length=0)


def _minimum_with_adapter(model: nn.Module, located: LocatedModel, plan: Plan) -> MemoryByPart:
    """The minimum for the base alone, because an adapter is comparatively small and takes seconds to add."""
    bytes_per_weight: float = (
        located.dtype.itemsize if located.dtype is not None and plan.mixed_precision != "no" else FLOAT32_BYTES
    )
    if plan.lora is not None and plan.lora["quantize"] is not None:
        bytes_per_weight = QUANTIZED_BYTES
    weights = int(bytes_per_weight * sum(parameter.numel() for parameter in model.parameters()))
    stage = 0 if plan.strategy == "replicated" else FSDP_STAGE
    parts = parts_per_process(weights=weights, num_trained=0, optimizer=0, stage=stage, num_processes=plan.num_shards)
    return MemoryByPart(weights=0 if plan.fsdp_cpu_offload else parts.weights, gradients=0, optimizer=0)


def check_before_training(
    model: nn.Module, plan: Plan, mean_length: float, *, may_split: bool, capacity: int | None = None
) -> None:
    """Raise `OutOfMemory` if `minimum_memory` exceeds the memory that a process can have (``capacity``, in bytes).

    With ``may_split``, the Trainer may use smaller micro-batches, so only a single sequence must fit.
    """
    capacity = capacity or memory_capacity(plan)
    smallest = replace(plan, batch_size=1) if may_split else plan
    minimum = minimum_memory(model, smallest, mean_length)
    if minimum.total <= capacity:
        return
    patch = _patch_that_fits(model, smallest, mean_length, capacity)
    with_reserve = _patch_that_fits(model, smallest, mean_length, capacity // 2)
    if with_reserve is not None and with_reserve.keys() <= {"batch_size", "gradient_accumulate_every"}:
        patch = with_reserve  # half of the memory remains for the activations
    hint = NO_LESS_MEMORY if patch is None else "With the patch, the minimum fits; activations are not included."
    raise _error(minimum, capacity, hint=hint, patch=patch)


def check_host_memory(model: nn.Module, plan: Plan, num_ranks: int, *, capacity: int | None = None) -> None:
    """Raise `OutOfMemory` if what ``num_ranks`` ranks of this host offload to it exceeds its memory (``capacity``)."""
    if not plan.fsdp_cpu_offload:
        return
    capacity = capacity or total_memory_bytes()
    parts = shard_bytes(model, plan)
    needed = MemoryByPart(
        weights=num_ranks * parts.weights,
        gradients=num_ranks * parts.gradients,
        optimizer=num_ranks * parts.optimizer,
    )
    if needed.total <= capacity:
        return
    raise OutOfMemory(
        f"fsdp_cpu_offload needs at least {format_bytes(needed.total)} of this host's memory ({needed}), but it has "
        f"only {format_bytes(capacity)}.",
        hint="Train an adapter with lora, use bf16_weights or optimizer_states, or use more hosts or one with more "
        "memory.",
        evidence={"needed_bytes": needed.total, "capacity_bytes": capacity, "memory": needed.as_evidence()},
        code="cannot_fit",
    )


def memory_options(plan: Plan) -> dict[str, JsonValue]:
    """The options that determine memory usage, with the gradient accumulation for this global batch."""
    return {
        "batch_size": plan.batch_size,
        "gradient_accumulate_every": plan.global_batch // plan.world_size // plan.batch_size,
        "seq_len": plan.seq_len,
        "use_activation_checkpointing": plan.use_activation_checkpointing,
    }


def _error(needed: MemoryByPart, capacity: int, *, hint: str, patch: Patch | None = None) -> OutOfMemory:
    """The error to raise if the lower bound does not fit."""
    return OutOfMemory(
        f"Training needs at least {format_bytes(needed.total)} per process ({needed}), but only "
        f"{format_bytes(capacity)} is available.",
        hint=hint,
        patch=patch,
        evidence={"needed_bytes": needed.total, "capacity_bytes": capacity, "memory": needed.as_evidence()},
        code="cannot_fit",
    )


def _patch_that_fits(model: nn.Module, plan: Plan, mean_length: float, capacity: int) -> Patch | None:
    """The changes of `suggest_less_memory`, added one by one until the lower bound fits; None if it never does."""
    patch: Patch = {}
    while (suggestion := suggest_less_memory(memory_options(plan))).patch is not None:
        patch |= suggestion.patch
        changes = {name: value for name, value in suggestion.patch.items() if name != "gradient_accumulate_every"}
        plan = replace(plan, **changes)
        if minimum_memory(model, plan, mean_length).total <= capacity:
            return patch
    return None
