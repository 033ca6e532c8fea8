"""Estimating the memory of a micro-batch's forward and backward passes without allocating it.

Both passes run on tensors without storage, and the sizes of the tensors that exist at the same time are added up. The
buffers of a model that is sharded over several processes are added by hooks (`zeta_core.memory.gathering`).
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zeta_core.data.sequences import MicroBatch
from zeta_core.memory.fused_attention import fused_attention, single_documents
from zeta_core.memory.gathering import gathered_weights
from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.objective.chunked_loss import LossTargets, OutputHead, find_output_head, returning_losses
from zeta_core.objective.isolation import Isolation
from zeta_core.objective.loss import cross_entropy_sum, find_logits, shifted
from zeta_core.plan import Plan

MIN_TOKENS = 8  # with which the model is called to find its output layer
HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def activation_bytes(
    model: nn.Module,
    plan: Plan,
    *,
    on_gpu: bool = False,
    isolation: Isolation | None = None,
) -> int:
    """The peak memory of one micro-batch's forward and backward passes, without weights and gradients, in bytes.

    ``model`` has the trainable parameters of the run and is on the meta device; its tensors are replaced. ``on_gpu``
    assumes kernels of GPUs, which compute attention without the scores of all pairs of tokens.
    ``isolation`` keeps the documents of a packed sequence apart with arguments such as masks.

    The peak contains the activations that autograd saves, masks, the logits with their gradient, with activation
    checkpointing the block that is recomputed, and under FSDP2 the gathered weights and the gradients that are not
    reduced yet. Gradients exist from the start, as in the second micro-batch of a step. Temporary buffers of kernels
    and freed memory that an allocator keeps are not counted. A model that reads values of tensors may raise any
    exception.
    """
    computed_in = HALF_PRECISIONS.get(plan.mixed_precision)
    converts = plan.strategy != "replicated"  # engines that shard weights convert them, and need no autocast
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        simulate_storage(model, computed_in if converts else None)
        model.train()
        blocks = repeated_blocks(model)
        if plan.strategy != "fsdp2":
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        stack.enter_context(
            recomputed_activations(blocks, plan.use_activation_checkpointing, offloading=_discarded_tensors)
        )
        if on_gpu:
            stack.enter_context(fused_attention())
        if isolation is None or not isolation.positions:
            stack.enter_context(single_documents())
        live = stack.enter_context(LiveTensors(model))
        if plan.strategy == "fsdp2":
            stack.enter_context(gathered_weights(model, blocks, live, plan.num_shards, from_host=plan.fsdp_cpu_offload))
        with torch.autocast("cpu", dtype=computed_in, enabled=computed_in is not None and not converts):
            loss = _loss(model, plan, isolation)
        if loss is not None:
            torch.autograd.backward(loss)
    return live.peak_bytes


def simulate_storage(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace all tensors by ones that behave as if they were on a CPU; tied parameters stay tied.

    Floating-point parameters get ``dtype``, unless it is None.
    """
    replaced: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in replaced:
                kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                simulated = torch.empty(parameter.shape, dtype=kind, device="cpu")
                replaced[id(parameter)] = nn.Parameter(simulated, requires_grad=parameter.requires_grad)
            setattr(part, name, replaced[id(parameter)])
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _discarded_tensors() -> saved_tensors_hooks:
    """Hooks that discard the saved tensors, as if they were moved to the memory of the host."""
    return saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype), lambda saved: torch.empty(saved[0], dtype=saved[1])
    )


def _loss(model: nn.Module, plan: Plan, isolation: Isolation | None) -> torch.Tensor | None:
    """The loss of one micro-batch, in chunks if training computes it in chunks; None if the model has no logits."""
    ids_BT = torch.zeros(plan.batch_size, plan.seq_len, dtype=torch.long)
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "config") else {}
    head = None if plan.strategy == "zero" else _output_head(model, ids_BT[:, :MIN_TOKENS], options)
    if isolation is not None:
        options |= isolation.arguments(
            MicroBatch(ids_BT, ids_BT, torch.zeros_like(ids_BT), torch.zeros_like(ids_BT), 0)
        )
    if head is not None and head.exceeds_a_chunk(ids_BT.numel()):
        targets = LossTargets(torch.arange(ids_BT.numel()), shifted(ids_BT).flatten())
        with returning_losses(model, head):
            return model(input_ids=ids_BT, **options, loss_targets=targets).loss
    logits_BTV = find_logits(model(ids_BT, **options))
    return None if logits_BTV is None else cross_entropy_sum(logits_BTV, shifted(ids_BT))


def _output_head(model: nn.Module, ids_BT: torch.Tensor, options: dict[str, Any]) -> OutputHead | None:
    try:
        return find_output_head(model, {"input_ids": ids_BT, **options})
    except Exception:  # noqa: BLE001 - the model can't be called in this way, so its loss is not computed in chunks
        return None
    finally:
        torch.clear_autocast_cache()  # a block must convert its weights in its own call, as when it is recomputed


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations in this context create, for as long as they are referenced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        known = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        self._known = {_storage(tensor): tensor for tensor in (*known, *model.buffers())}  # keeps their addresses valid
        self._created = set[int]()
        self._bytes = self.peak_bytes = 0

    def add(self, size: int) -> None:
        """Count a buffer of ``size`` bytes, until it is removed with the negative size."""
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not self._is_counted(leaf):
                size = leaf.untyped_storage().nbytes()
                self._created.add(_storage(leaf))
                self.add(size)
                weakref.finalize(leaf.untyped_storage(), self._freed, _storage(leaf), size)
        return result

    def _is_counted(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._known or _storage(tensor) in self._created

    def _freed(self, storage: int, size: int) -> None:
        self._created.remove(storage)
        self._bytes -= size


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage] - stands in for its address
