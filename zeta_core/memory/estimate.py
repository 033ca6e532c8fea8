"""How much memory a run will take, found out without taking it: shapes are computed, numbers are not.

Weights, gradients and the optimizer's state follow from the parameters. Activations are counted by running the model
on tensors without storage and adding up what autograd would keep (each storage once, the weights left out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zeta_core.contract.check import MemoryEstimate
from zeta_core.contract.memory import FLOAT32_BYTES, FSDP_STAGE, least_state_bytes, memory_parts
from zeta_core.memory.usage import num_bytes
from zeta_core.model.activation import checkpointed, repeated_blocks
from zeta_core.objective.loss import cross_entropy_sum, logits_of, shifted
from zeta_core.optim.optimizer import orthogonal_matrices
from zeta_core.plan import Plan


def memory_of(model: nn.Module, plan: Plan, activations: int | None, *, zero_stage: int) -> MemoryEstimate:
    """Of one process; ``model`` may be without storage. ``zero_stage`` is 0 where DeepSpeed is not used."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = num_bytes(model.parameters())
    parts = memory_parts(
        weights=weights,
        num_trained=sum(parameter.numel() for parameter in trained),
        optimizer=optimizer_bytes(model, trained, plan),
        stage=FSDP_STAGE if plan.strategy == "fsdp2" else zero_stage,
        num_processes=plan.world_size,
    )
    total = None if activations is None else parts.weights + parts.gradients + parts.optimizer + activations
    return MemoryEstimate(**parts.model_dump(exclude={"activations"}), activations=activations, total=total)


def optimizer_bytes(model: nn.Module, trained: list[nn.Parameter], plan: Plan) -> int:
    """The state of the whole optimizer, over all processes: what is certain of it, and what the shapes add to that."""
    values = sum(parameter.numel() for parameter in trained)
    least = least_state_bytes(plan.optimizer, values)
    match plan.optimizer:
        case "adamw" | "sgd" | "lion":
            return least
        case "muon":
            matrices = sum(parameter.numel() for parameter in orthogonal_matrices(model, repeated_blocks(model)))
            return least + FLOAT32_BYTES * (values - matrices)
        case "adafactor":
            factors = sum(
                parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]
                if parameter.dim() >= 2
                else parameter.numel()
                for parameter in trained
            )
            return least + FLOAT32_BYTES * factors


def activation_bytes(build: Callable[[], nn.Module], plan: Plan) -> int:
    """What one micro-batch leaves for its gradient, in bytes. Raises whatever a model raises that looks at numbers."""
    with FakeTensorMode():
        model = build()
        model.train()
        whole = _kept(model, plan)
        if not plan.use_activation_checkpointing:
            return whole
        blocks = repeated_blocks(model)
        inputs = _Kept(model)
        hooks = [block.register_forward_pre_hook(lambda _, given: inputs.all_of(given)) for block in blocks]
        with checkpointed(blocks):
            outside = _kept(model, plan)
        for hook in hooks:
            hook.remove()
        # The blocks' inputs stay; one block at a time has its inner activations, too.
        return outside + inputs.bytes + (whole - outside) // len(blocks)


def _kept(model: nn.Module, plan: Plan) -> int:
    kept = _Kept(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.mixed_precision)
    ids_BT = torch.zeros(plan.batch_size, plan.seq_len, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.one, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        options = {"use_cache": False} if hasattr(model, "config") else {}
        logits_BTV = logits_of(model(ids_BT, **options))
        if logits_BTV is not None:
            cross_entropy_sum(logits_BTV, shifted(ids_BT))
    return kept.bytes


class _Kept:
    """Storages, each counted once; those of the weights are not."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, torch.Tensor] = {_storage(p): p for p in model.parameters()}  # held, so that ids stay
        self.bytes = 0

    def one(self, tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in self._seen:
            self._seen[_storage(tensor)] = tensor
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def all_of(self, values: tuple[Any, ...]) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                self.one(value)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage] - its address, were there one
