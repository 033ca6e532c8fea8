"""Estimating the memory of activations without allocating it.

The forward and backward passes run on tensors without storage, and the sizes of the tensors that exist at the same time
are added up.
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

from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.objective.chunked_loss import LossTargets, OutputHead, find_output_head, returning_losses
from zeta_core.objective.loss import cross_entropy_sum, find_logits, shifted
from zeta_core.plan import Plan

MIN_TOKENS = 8  # with which the model is called to find its output layer


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
        live = stack.enter_context(_LiveTensors(model))
        _forward_and_backward(model, plan)
        return live.peak_bytes


def _forward_and_backward(model: nn.Module, plan: Plan) -> None:
    """Run one micro-batch, with its loss in chunks if training uses them.

    A model without logits only runs the forward pass.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.mixed_precision)
    ids_BT = torch.zeros(plan.batch_size, plan.seq_len, dtype=torch.long)
    options = {"use_cache": False} if hasattr(model, "config") else {}
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        head = None if plan.strategy == "zero" else _output_head(model, ids_BT[:, :MIN_TOKENS], options)
        if head is not None and head.exceeds_a_chunk(ids_BT.numel()):
            targets = LossTargets(torch.arange(ids_BT.numel()), shifted(ids_BT).flatten())
            with returning_losses(model, head):
                loss = model(input_ids=ids_BT, **options, loss_targets=targets).loss
        else:
            logits_BTV = find_logits(model(ids_BT, **options))
            if logits_BTV is None:
                return
            loss = cross_entropy_sum(logits_BTV, shifted(ids_BT))
            del logits_BTV  # as in training, which keeps only the loss
    torch.autograd.backward(loss)


def _output_head(model: nn.Module, ids_BT: torch.Tensor, options: dict[str, Any]) -> OutputHead | None:
    try:
        return find_output_head(model, {"input_ids": ids_BT, **options})
    except Exception:  # noqa: BLE001 - the model can't be called in this way, so its loss is not computed in chunks
        return None


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations in this context create, for as long as they are referenced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        known = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        self._known = {_storage(tensor): tensor for tensor in (*known, *model.buffers())}  # keeps their addresses valid
        self._created = set[int]()
        self._bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not self._is_counted(leaf):
                size = leaf.untyped_storage().nbytes()
                self._created.add(_storage(leaf))
                self._bytes += size
                self.peak_bytes = max(self.peak_bytes, self._bytes)
                weakref.finalize(leaf.untyped_storage(), self._freed, _storage(leaf), size)
        return result

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._known or _storage(tensor) in self._created

    def _freed(self, storage: int, size: int) -> None:
        self._created.remove(storage)
        self._bytes -= size


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage] - stands in for its address
