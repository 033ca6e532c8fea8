"""Training steps on tensors without storage: the memory that a rank would need, as torch's `MemTracker` counts it.

It uses the real model, adapter, sharding and optimizer, and a process group that exchanges nothing, so any model and
any number of ranks can be measured. The estimate under test shares none of the counting code.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from zeta_core.memory.activations import simulate_storage
from zeta_core.memory.estimate import building
from zeta_core.memory.fused_attention import fused_attention, single_documents
from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.quantization import BLOCK_SCALES, BLOCK_WEIGHTS
from zeta_core.objective.chunked_loss import LossTargets, OutputHead, find_output_head, returning_losses
from zeta_core.objective.loss import cross_entropy_sum, shifted
from zeta_core.optim.optimizer import ParameterGroups, build_optimizer
from zeta_core.parallel.fsdp import shard
from zeta_core.plan import Plan


@contextmanager
def fake_process_group(num_processes: int) -> Generator[None]:
    dist.init_process_group("fake", rank=0, world_size=num_processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Total(MemTracker):
    """Counts all tensors, without statistics of single modules, which may be called once only."""

    def __init__(self) -> None:
        super().__init__()
        self._mod_tracker = cast(Any, _NoModules())


class _NoModules:
    is_bw = False
    parents: frozenset[str] = frozenset()

    def register_user_hooks(self, *hooks: Any) -> None: ...

    def clear_user_hooks(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def peak_of_a_rank(located: LocatedModel, plan: Plan) -> int:
    """The peak bytes of the first rank in the second micro-batch of its second step."""
    device, model = torch.device("cpu"), building(located)(plan)
    with fake_process_group(plan.world_size), ExitStack() as stack:
        mesh = init_device_mesh(device.type, (plan.world_size,))
        stack.enter_context(FakeTensorMode())
        simulate_storage(model, None)
        _replace_quantized_layers(model)
        blocks = repeated_blocks(model)
        head = find_output_head(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False})
        if plan.strategy == "fsdp2":
            shard(model, blocks, mesh, plan)
        groups = ParameterGroups.of(model, blocks, plan.optimizer)
        optimizer = build_optimizer(
            plan.optimizer, model, groups, learning_rate=1e-3, weight_decay=0.1, states=plan.optimizer_states
        )
        model.train()
        with recomputed_activations(blocks, plan.use_activation_checkpointing):
            stack.enter_context(fused_attention())
            stack.enter_context(single_documents())
            tracker = _Total()
            for parameter in model.parameters():  # the state and the gradients after a first micro-batch
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            if plan.holds_whole_gradients:
                optimizer.zero_grad()
            tracker.track_external(model, optimizer)
            with tracker:
                if plan.holds_whole_gradients:
                    cast(FSDPModule, model).set_requires_gradient_sync(False)
                    _micro_step(model, head, plan)
                    cast(FSDPModule, model).set_requires_gradient_sync(True)
                _micro_step(model, head, plan)
                optimizer.step()
            return tracker.get_tracker_snapshot("peak")[device]["Total"]


class _Dequantize(torch.autograd.Function):
    """The product with 4-bit weights. As in bitsandbytes, only the packed weights are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ _dequantized(packed, shape, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (packed,) = ctx.saved_tensors
        return grad @ _dequantized(packed, ctx.shape, grad.dtype), None, None


def _dequantized(packed: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _replace_quantized_layers(model: nn.Module) -> None:
    """Replace the products of quantized layers, whose kernels need storage; the scales are one more buffer."""
    for part in cast("Iterator[Any]", model.modules()):
        if type(part).__module__.startswith("bitsandbytes"):
            shape, half = (int(part.out_features), int(part.in_features)), torch.bfloat16
            num_scales = shape[0] * shape[1] // BLOCK_WEIGHTS
            part.scales = torch.empty(num_scales + 4 * num_scales // BLOCK_SCALES, dtype=torch.uint8)
            part.forward = partial(_quantized_product, part, shape, half)


def _quantized_product(part: Any, shape: tuple[int, int], dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return cast("torch.Tensor", _Dequantize.apply(x.to(dtype), part.weight, shape))


def _micro_step(model: nn.Module, head: OutputHead | None, plan: Plan) -> None:
    half = torch.bfloat16 if plan.mixed_precision == "bf16" else None
    ids_BT = torch.zeros(plan.batch_size, plan.seq_len, dtype=torch.long)
    autocasts = half is not None and plan.strategy == "replicated"
    with torch.autocast("cpu", dtype=half) if autocasts else nullcontext():
        if head is not None and head.exceeds_a_chunk(ids_BT.numel()):
            targets = LossTargets(torch.arange(ids_BT.numel()), shifted(ids_BT).flatten())
            with returning_losses(model, head):
                loss = model(input_ids=ids_BT, use_cache=False, loss_targets=targets).loss
        else:
            loss = cross_entropy_sum(model(input_ids=ids_BT, use_cache=False).logits, shifted(ids_BT))
    loss.backward()
