"""Refusing a model that can never be trained here, before its weights are downloaded, read or built.

The config and the options determine a lower bound without any data: weights, gradients and the optimizer's state
(`needs`). On a CPU, an oversized run ends here; otherwise, Linux would kill it without a message while it loads. Only
models with a config are checked. A script's own module is already in memory, and a callable that builds one must not
run twice.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from zeta_core import plan as planning
from zeta_core.contract.job.advice import NO_LESS_MEMORY
from zeta_core.contract.job.memory import FLOAT32_BYTES, FSDP_STAGE, memory_parts
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import ConfigModel, FileModel, JobModel
from zeta_core.data.sources import SourceLocations
from zeta_core.memory.needs import Parts, capacity_of, least_needed, refusal
from zeta_core.model.freezing import freeze
from zeta_core.model.gguf import is_gguf
from zeta_core.model.inspection import facts_without_data
from zeta_core.model.sources import LocatedModel, locate_model
from zeta_core.plan import Plan

QUANTIZED_BYTES = 0.5  # per weight in 4 bits; not all weights are quantized
LORA_HINT = (
    "With the patch an adapter is trained instead of every weight, and what is certain fits; activations come on top."
)


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
    located = locate_model(model, replace(locations, weights=False), cache)
    if located.needs_weights or (located.directory is not None and is_gguf(located.directory)):
        return
    with torch.device("meta"):
        model = located.build()
    facts = facts_without_data(model, pretrained=located.pretrained, world_size=world_size)
    plan = planning.decide(options, facts, None)
    capacity = capacity or capacity_of(plan)
    needed = _least_with_adapter(model, located, plan) if plan.lora is not None else _least(model, plan)
    if needed.total <= capacity:
        return
    may_adapt = located.pretrained and plan.lora is None and not plan.freeze
    if may_adapt and _least_with_adapter(model, located, plan).total <= capacity:
        raise refusal(needed, capacity, hint=LORA_HINT, patch={"lora": {}})
    raise refusal(needed, capacity, hint=NO_LESS_MEMORY)


def _least(model: nn.Module, plan: Plan) -> Parts:
    """`least_needed` if every weight that is not frozen is trained, without any data."""
    model.float()
    freeze(model, plan.freeze)
    return least_needed(model, plan, mean_length=0)


def _least_with_adapter(model: nn.Module, located: LocatedModel, plan: Plan) -> Parts:
    """The minimum for the base alone, because an adapter is comparatively small and takes seconds to add."""
    each: float = (
        located.dtype.itemsize if located.dtype is not None and plan.mixed_precision != "no" else FLOAT32_BYTES
    )
    if plan.lora is not None and plan.lora["quantize"] is not None:
        each = QUANTIZED_BYTES
    weights = int(each * sum(parameter.numel() for parameter in model.parameters()))
    stage = 0 if plan.strategy == "replicated" else FSDP_STAGE
    parts = memory_parts(weights=weights, num_trained=0, optimizer=0, stage=stage, num_processes=plan.world_size)
    return Parts(weights=parts.weights, gradients=0, optimizer=0)
