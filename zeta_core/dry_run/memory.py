"""Estimating the memory of a run without allocating it: only shapes are computed.

Weights, gradients and the optimizer's state follow from the parameters. Activations are measured by running the forward
and backward passes on tensors without storage, and adding up the tensors that exist at the same time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zeta_core.contract.job.check import MemoryEstimate
from zeta_core.contract.job.memory import FLOAT32_BYTES, FSDP_STAGE, least_state_bytes, memory_parts
from zeta_core.memory.usage import num_bytes
from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.objective.loss import cross_entropy_sum, logits_of, shifted
from zeta_core.optim.roles import roles_of
from zeta_core.plan import Plan


def memory_of(model: nn.Module, plan: Plan, activations: int | None, *, zero_stage: int) -> MemoryEstimate:
    """The memory of one process. ``model`` may have no storage. ``zero_stage`` is 0 if DeepSpeed is not used."""
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
    """The size of the whole optimizer state, over all processes: the lower bound, and what the shapes add to it."""
    values = sum(parameter.numel() for parameter in trained)
    least = least_state_bytes(plan.optimizer, values)
    match plan.optimizer:
        case "adamw" | "sgd" | "lion":
            return least
        case "muon":
            roles = roles_of(model, repeated_blocks(model))
            named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            matrices = sum(parameter.numel() for name, parameter in named if roles[name].is_orthogonalized)
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
    """The peak memory of one micro-batch's forward and backward passes, without weights and gradients, in bytes.

    It is the peak of all tensors: the activations that autograd saves, the logits with their gradient, and with
    activation checkpointing, the block that is recomputed. Gradients exist from the start, as in the second micro-batch
    of a step. Temporary buffers of kernels and freed memory that an allocator keeps are not counted. A model that reads
    values of tensors may raise any exception.
    """
    with FakeTensorMode(), ExitStack() as stack:
        model = build()
        model.train()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        if plan.use_activation_checkpointing:
            stack.enter_context(recomputed_activations(repeated_blocks(model)))
        live = stack.enter_context(_Live(model))
        _forward_and_backward(model, plan)
        return live.most_bytes


def _forward_and_backward(model: nn.Module, plan: Plan) -> None:
    """Run one micro-batch. A model without logits only runs the forward pass."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.mixed_precision)
    ids_BT = torch.zeros(plan.batch_size, plan.seq_len, dtype=torch.long)
    options = {"use_cache": False} if hasattr(model, "config") else {}
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        logits_BTV = logits_of(model(ids_BT, **options))
        if logits_BTV is None:
            return
        loss = cross_entropy_sum(logits_BTV, shifted(ids_BT))
    del logits_BTV  # as in training, which keeps only the loss
    torch.autograd.backward(loss)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations in this context create, for as long as they are referenced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        known = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        self._known = {_storage(tensor): tensor for tensor in (*known, *model.buffers())}  # keeps ids valid
        self._made = set[int]()
        self._bytes = self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and _storage(one) not in self._known and _storage(one) not in self._made:
                size = one.untyped_storage().nbytes()
                self._made.add(_storage(one))
                self._bytes += size
                self.most_bytes = max(self.most_bytes, self._bytes)
                weakref.finalize(one.untyped_storage(), self._freed, _storage(one), size)
        return result

    def _freed(self, storage: int, size: int) -> None:
        self._made.remove(storage)
        self._bytes -= size


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage] - stands in for its address
