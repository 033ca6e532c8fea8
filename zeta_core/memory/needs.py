"""The minimum memory of a run, the available memory, and the settings that reduce memory usage.

The minimum is a lower bound: weights, their gradients, the optimizer's state, and the logits of one micro-batch.
Activations are not included. A run is therefore refused only if it can't fit: before its model is loaded
(`before_loading`), and before its first step, when the data is known, too. If it runs out of memory later,
`zeta_core.train.out_of_memory` reports the memory of each part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import JsonValue
from torch import nn

from zeta_core.contract.job.advice import NO_LESS_MEMORY, Patch, suggest_less_memory
from zeta_core.contract.job.memory import FLOAT32_BYTES, FSDP_STAGE, MemoryParts, least_state_bytes, memory_parts
from zeta_core.environment import free_memory_bytes, total_memory_bytes
from zeta_core.failures import OutOfMemory
from zeta_core.memory.usage import num_bytes
from zeta_core.plan import Plan

# Per logit, in the backward pass of the loss: its log-softmax and its gradient, both in float32.
LOGIT_BYTES = 8


class Parts(MemoryParts):
    """The lower bound of each part. The only activations in it are the ``logits``."""

    logits: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.logits

    def __str__(self) -> str:
        return ", ".join(f"{name} {_size(size)}" for name, size in self._sizes().items() if size)

    def as_evidence(self) -> dict[str, JsonValue]:
        return {**self._sizes()}

    def _sizes(self) -> dict[str, int]:
        return self.model_dump(exclude={"activations"})


def least_needed(model: nn.Module, plan: Plan, mean_length: float) -> Parts:
    """The minimum that each process needs. The trainable parameters of ``model`` are set; it is not sharded yet.

    ``mean_length`` is the mean number of tokens per sequence, padding included; some micro-batch has at least this
    many.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = memory_parts(
        weights=num_bytes(model.parameters()),
        num_trained=trained,
        optimizer=least_state_bytes(plan.optimizer, trained),
        stage=0 if plan.strategy == "replicated" else FSDP_STAGE,  # the DeepSpeed stage that shards everything
        num_processes=plan.world_size,
    )
    half = 2 if plan.strategy == "zero" else 1  # weights and gradients may be in half precision
    rows = min(plan.batch_size, max(1, plan.total_sequences // plan.world_size))
    return Parts(
        weights=parts.weights // half,
        gradients=parts.gradients // half,
        optimizer=parts.optimizer,
        logits=int(LOGIT_BYTES * rows * min(mean_length, plan.seq_len) * _num_logits(model)),
    )


def check_it_can_fit(
    model: nn.Module, plan: Plan, mean_length: float, *, may_split: bool, capacity: int | None = None
) -> None:
    """Raise `OutOfMemory` if `least_needed` exceeds the memory that a process can have (``capacity``, in bytes).

    With ``may_split``, the Trainer may use smaller micro-batches, so only a single sequence must fit.
    """
    capacity = capacity or capacity_of(plan)
    smallest = replace(plan, batch_size=1) if may_split else plan
    needed = least_needed(model, smallest, mean_length)
    if needed.total <= capacity:
        return
    patch = _patch_that_fits(model, smallest, mean_length, capacity)
    roomy = _patch_that_fits(model, smallest, mean_length, capacity // 2)
    if roomy is not None and roomy.keys() <= {"batch_size", "gradient_accumulate_every"}:
        patch = roomy  # this one leaves as much memory again for the activations
    hint = NO_LESS_MEMORY if patch is None else "With the patch what is certain fits; activations come on top."
    raise refusal(needed, capacity, hint=hint, patch=patch)


def refusal(needed: Parts, capacity: int, *, hint: str, patch: Patch | None = None) -> OutOfMemory:
    """The error to raise if the lower bound does not fit."""
    return OutOfMemory(
        f"Training needs at least {_size(needed.total)} per process ({needed}), and there are {_size(capacity)}.",
        hint=hint,
        patch=patch,
        evidence={"needed_bytes": needed.total, "capacity_bytes": capacity, "memory": needed.as_evidence()},
        code="cannot_fit",
    )


def has_plenty(model: nn.Module, plan: Plan, mean_length: float, values_per_token: int) -> bool:
    """Whether a CPU has twice the roughly estimated memory free, so that a peak a quarter higher does no harm.

    The estimate is `least_needed` plus the activations of a micro-batch, which follow from ``values_per_token``.
    """
    activations = FLOAT32_BYTES * plan.batch_size * plan.seq_len * values_per_token
    needed = least_needed(model, plan, mean_length).total + activations
    return 2 * needed <= min(free_memory_bytes(), total_memory_bytes()) // plan.world_size


def _patch_that_fits(model: nn.Module, plan: Plan, mean_length: float, capacity: int) -> Patch | None:
    """The changes of `suggest_less_memory`, added one by one until the lower bound fits; None if it never does."""
    patch: Patch = {}
    while (cure := suggest_less_memory(options_of(plan))).patch is not None:
        patch |= cure.patch
        changes = {name: value for name, value in cure.patch.items() if name != "gradient_accumulate_every"}
        plan = replace(plan, **changes)
        if least_needed(model, plan, mean_length).total <= capacity:
            return patch
    return None


def held(module: nn.Module, optimizer: torch.optim.Optimizer) -> Parts:
    """The memory that each part takes in this process now."""
    parameters = list(module.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    return Parts(
        weights=num_bytes(parameters),
        gradients=num_bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        optimizer=num_bytes(value for value in state if isinstance(value, torch.Tensor)),
    )


def options_of(plan: Plan) -> dict[str, JsonValue]:
    """The options that determine memory usage, with the gradient accumulation for this global batch."""
    return {
        "batch_size": plan.batch_size,
        "gradient_accumulate_every": plan.global_batch // plan.world_size // plan.batch_size,
        "seq_len": plan.seq_len,
        "use_activation_checkpointing": plan.use_activation_checkpointing,
    }


def capacity_of(plan: Plan) -> int:
    """The memory that one process can have, in bytes: its GPU's, or its share of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total_memory_bytes() // plan.world_size


def _num_logits(model: nn.Module) -> int:
    """The number of logits per token if the model names its output layer, otherwise 0."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    weight = getattr(head, "weight", None)  # a linear layer, or peft's wrapper of one
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0


def _size(number_of_bytes: int) -> str:
    return f"{number_of_bytes / 2**30:.3g} GiB" if number_of_bytes >= 2**29 else f"{number_of_bytes / 2**20:.3g} MiB"
