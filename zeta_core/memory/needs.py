"""What a run surely needs of memory, what there is, and what to change when it was not enough.

The needs are a lower bound made of what is certain: weights, their gradients, the optimizer's state, and the logits of
one micro-batch. Activations come on top and are not guessed. So a run is refused only where it cannot fit: before its
model is loaded (`before_loading`), and before its first step, when the data is known too; where it turns out not to,
`zeta_core.train.out_of_memory` says what was held, and by which part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import JsonValue
from torch import nn

from zeta_core.contract.advice import NO_LESS_MEMORY, Patch, less_memory
from zeta_core.contract.memory import FLOAT32_BYTES, FSDP_STAGE, MemoryParts, least_state_bytes, memory_parts
from zeta_core.failures import OutOfMemory
from zeta_core.memory.usage import num_bytes
from zeta_core.plan import Plan
from zeta_core.settings import free_memory_bytes, total_memory_bytes

# Of each logit while the loss goes backward: its logarithmic softmax and its gradient, both in float32.
LOGIT_BYTES = 8


class Parts(MemoryParts):
    """What is certain of them; of the activations that are the ``logits`` alone."""

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
    """What each process needs at least; ``model`` knows what is trained, and is not spread over processes yet.

    ``mean_length`` is that of the sequences in tokens, padding included: some micro-batch has as many in each.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parts = memory_parts(
        weights=num_bytes(model.parameters()),
        num_trained=trained,
        optimizer=least_state_bytes(plan.optimizer, trained),
        stage=0 if plan.strategy == "replicated" else FSDP_STAGE,  # of DeepSpeed's stages the one that shares all
        num_processes=plan.world_size,
    )
    half = 2 if plan.strategy == "zero" else 1  # perhaps it keeps weights and gradients in half precision
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
    """Raise `OutOfMemory` where `least_needed` is more than a process can have at all (``capacity``, in bytes).

    ``may_split``: the Trainer may use smaller micro-batches, so that a single sequence is what must fit.
    """
    capacity = capacity or capacity_of(plan)
    smallest = replace(plan, batch_size=1) if may_split else plan
    needed = least_needed(model, smallest, mean_length)
    if needed.total <= capacity:
        return
    patch = _patch_that_fits(model, smallest, mean_length, capacity)
    roomy = _patch_that_fits(model, smallest, mean_length, capacity // 2)
    if roomy is not None and roomy.keys() <= {"batch_size", "gradient_accumulate_every"}:
        patch = roomy  # the same numbers, and as much again for the activations
    hint = NO_LESS_MEMORY if patch is None else "With the patch what is certain fits; activations come on top."
    raise refusal(needed, capacity, hint=hint, patch=patch)


def refusal(needed: Parts, capacity: int, *, hint: str, patch: Patch | None = None) -> OutOfMemory:
    """What to raise where what is certain does not fit."""
    return OutOfMemory(
        f"Training needs at least {_size(needed.total)} per process ({needed}), and there are {_size(capacity)}.",
        hint=hint,
        patch=patch,
        evidence={"needed_bytes": needed.total, "capacity_bytes": capacity, "memory": needed.as_evidence()},
        code="cannot_fit",
    )


def has_plenty(model: nn.Module, plan: Plan, mean_length: float, values_per_token: int) -> bool:
    """Whether a CPU has twice the memory free that a rough count says, so that a peak a quarter higher harms nothing.

    The count is what `least_needed` knows and, from ``values_per_token``, the activations of a micro-batch.
    """
    activations = FLOAT32_BYTES * plan.batch_size * plan.seq_len * values_per_token
    needed = least_needed(model, plan, mean_length).total + activations
    return 2 * needed <= min(free_memory_bytes(), total_memory_bytes()) // plan.world_size


def _patch_that_fits(model: nn.Module, plan: Plan, mean_length: float, capacity: int) -> Patch | None:
    """The changes of `less_memory`, one after the other, until what is certain fits; None where it never does."""
    patch: Patch = {}
    while (cure := less_memory(options_of(plan))).patch is not None:
        patch |= cure.patch
        changes = {name: value for name, value in cure.patch.items() if name != "gradient_accumulate_every"}
        plan = replace(plan, **changes)
        if least_needed(model, plan, mean_length).total <= capacity:
            return patch
    return None


def held(module: nn.Module, optimizer: torch.optim.Optimizer) -> Parts:
    """What this process holds of each part now."""
    parameters = list(module.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    return Parts(
        weights=num_bytes(parameters),
        gradients=num_bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        optimizer=num_bytes(value for value in state if isinstance(value, torch.Tensor)),
    )


def options_of(plan: Plan) -> dict[str, JsonValue]:
    """What decides about memory; the accumulation as it would be for this global batch."""
    return {
        "batch_size": plan.batch_size,
        "gradient_accumulate_every": plan.global_batch // plan.world_size // plan.batch_size,
        "seq_len": plan.seq_len,
        "use_activation_checkpointing": plan.use_activation_checkpointing,
    }


def capacity_of(plan: Plan) -> int:
    """Bytes that one process can have: its GPU's, or its share of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total_memory_bytes() // plan.world_size


def _num_logits(model: nn.Module) -> int:
    """Logits of each token where the model says which layer gives them; 0 where it does not."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    weight = getattr(head, "weight", None)  # of a linear layer, or of peft's wrapper of one
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 0


def _size(number_of_bytes: int) -> str:
    return f"{number_of_bytes / 2**30:.3g} GiB" if number_of_bytes >= 2**29 else f"{number_of_bytes / 2**20:.3g} MiB"
