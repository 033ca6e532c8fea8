"""Training steps on tensors without storage: the memory that a rank would need, as torch's `MemTracker` counts it.

It uses the real model, adapter, sharding and optimizer, and a process group that exchanges nothing, so any model and
any number of ranks can be measured. The estimate under test shares none of the counting code.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed import fake_pg

from zeta_core.memory.activations import simulate_storage
from zeta_core.memory.estimate import building
from zeta_core.memory.fused_attention import fused_attention, single_documents
from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.model.located_model import LocatedModel
from zeta_core.objective.chunked_loss import LossTargets, OutputHead, find_output_head, returning_losses
from zeta_core.objective.loss import cross_entropy_sum, shifted
from zeta_core.optim.optimizer import ParameterGroups, build_optimizer
from zeta_core.parallel.fsdp import shard
from zeta_core.plan import Plan


@contextmanager
def fake_process_group(num_processes: int, device: torch.device) -> Generator[None]:
    backend = "fake"
    if device.type != "cpu":
        backend = f"cpu:fake-pair,{device.type}:fake-pair"
        create_group = fake_pg._create_fake_pg  # pyright: ignore[reportPrivateUsage] - "fake" is for known types only
        dist.Backend.register_backend("fake-pair", create_group, extended_api=True, devices=["cpu", device.type])
    dist.init_process_group(backend, rank=0, world_size=num_processes, store=fake_pg.FakeStore())
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
    return peaks_of_a_rank(located, plan, torch.device("cpu"))["cpu"]


def peaks_of_a_rank(located: LocatedModel, plan: Plan, device: torch.device) -> dict[str, int]:
    """The same for a model on ``device``, by device type; a part of it may be offloaded to the host."""
    model = building(located)(plan)
    with fake_process_group(plan.world_size, device), ExitStack() as stack:
        mesh = init_device_mesh(device.type, (plan.world_size,))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        simulate_storage(model, None)
        blocks = repeated_blocks(model)
        head = find_output_head(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False})
        _move(model, device)
        if plan.strategy == "fsdp2":
            shard(model, blocks, mesh, plan)
        groups = ParameterGroups.of(model, blocks, plan.optimizer)
        optimizer = build_optimizer(
            plan.optimizer,
            model,
            groups,
            learning_rate=1e-3,
            weight_decay=0.1,
            states=plan.optimizer_states,
            bf16_weights=plan.bf16_weights,
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
            with tracker, device:
                if plan.holds_whole_gradients:
                    cast(FSDPModule, model).set_requires_gradient_sync(False)
                    _micro_step(model, head, plan)
                    cast(FSDPModule, model).set_requires_gradient_sync(True)
                _micro_step(model, head, plan)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            return {place.type: parts["Total"] for place, parts in tracker.get_tracker_snapshot("peak").items()}


def _move(model: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers without storage by ones on another device type; tied parameters stay tied."""
    if device.type == "cpu":
        return
    replaced: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, old in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(old) not in replaced:
                replaced[id(old)] = nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)
            setattr(part, name, replaced[id(old)])
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            setattr(part, name, torch.empty_like(buffer, device=device))


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
