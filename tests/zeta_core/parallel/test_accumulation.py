"""Gradient accumulation with FSDP2: between micro-batches, a process holds shards of the gradients, or whole ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.harness.fake_training import fake_process_group
from tests.zeta_core.models import llama
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.environment import ProcessRank
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.parallel.fsdp import shard
from zeta_core.parallel.processes import Processes
from zeta_core.parallel.strategy import build_engine
from zeta_core.plan import Plan, PlanInputs, decide_plan, with_length


@pytest.fixture
def processes() -> Iterator[Processes]:
    group = Processes(ProcessRank(), need_group=True)
    yield group
    group.close()


def plan_of(num_processes: int, **options: Any) -> Plan:
    given = TrainerOptions(
        batch_size=1, gradient_accumulate_every=2, seq_len=8, use_fsdp=True, warmup_steps=0, max_steps=1, **options
    )
    inputs = PlanInputs(num_processes, "cpu", False, 1, 256, 1, 1 << 30, True, "data")
    return with_length(decide_plan(given, inputs, None), given, 2)


def gradients_of_two_micro_batches(processes: Processes, **options: Any) -> list[torch.Tensor | None]:
    """The shards of the gradients after each of two equal micro-batches; None if there are none yet."""
    plan = plan_of(1, **options)
    model = llama()
    engine = build_engine(model, plan, processes, blocks=repeated_blocks(model), deepspeed=None)
    gradients: list[torch.Tensor | None] = []
    for last in (False, True):
        with engine.micro_step(last=last):
            engine.backward(engine.model(torch.arange(8)[None]).logits.square().mean())
        shards = [parameter.grad for parameter in engine.module.parameters()]
        if all(shard is None for shard in shards):
            gradients.append(None)
            continue
        assert all(isinstance(shard, DTensor) for shard in shards), "they are reduced and sharded"
        gradients.append(torch.cat([shard.to_local().flatten() for shard in shards if isinstance(shard, DTensor)]))
    engine.close()
    return gradients


def test_fsdp2_reduces_the_gradients_of_each_micro_batch_or_once_per_step(processes: Processes) -> None:
    first, both = gradients_of_two_micro_batches(processes)
    assert first is not None
    torch.testing.assert_close(both, 2 * first)
    for precision in ("no", "bf16"):
        kept, reduced = gradients_of_two_micro_batches(processes, mixed_precision=precision, fsdp_keep_gradients=True)
        assert kept is None, "the gradients of the first micro-batch are not reduced yet"
        expected = gradients_of_two_micro_batches(processes, mixed_precision=precision)[1]
        torch.testing.assert_close(reduced, expected)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the larger side of each collective, by the name of its operation."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(func):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.num_bytes[str(func)] += max((tensor.nbytes for tensor in tensors), default=0)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_keeping_gradients_exchanges_them_once_per_step(precision: str) -> None:
    num_micro_batches = 8
    exchanged: dict[bool, Counter[str]] = {}
    for keep in (False, True):
        plan = plan_of(2, mixed_precision=precision, fsdp_keep_gradients=keep)
        with fake_process_group(2, torch.device("cpu")), Traffic() as traffic:
            model = llama()
            num_weights = sum(parameter.numel() for parameter in model.parameters())
            shard(model, repeated_blocks(model), init_device_mesh("cpu", (2,)), plan)
            for index in range(num_micro_batches):
                if keep:
                    cast(FSDPModule, model).set_requires_gradient_sync(index == num_micro_batches - 1)
                model(torch.arange(8)[None]).logits.float().square().mean().backward()
        exchanged[keep] = traffic.num_bytes
    (reduced,) = (name for name in exchanged[True] if "reduce_scatter" in name)
    (gathered,) = (name for name in exchanged[True] if "allgather" in name)
    assert exchanged[True][reduced] == 4 * num_weights, "in float32"
    assert exchanged[False][reduced] == num_micro_batches * exchanged[True][reduced]
    assert exchanged[False][gathered] == exchanged[True][gathered], "weights are gathered for each micro-batch"
