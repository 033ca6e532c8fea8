"""Gradient accumulation with FSDP2: between micro-batches, a process holds shards of the gradients, or whole ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.zeta_core.models import llama
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.environment import ProcessRank
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.parallel.processes import Processes
from zeta_core.parallel.strategy import build_engine
from zeta_core.plan import PlanInputs, decide_plan, with_length


@pytest.fixture
def processes() -> Iterator[Processes]:
    group = Processes(ProcessRank(), need_group=True)
    yield group
    group.close()


def gradients_of_two_micro_batches(processes: Processes, **options: Any) -> list[torch.Tensor | None]:
    """The shards of the gradients after each of two equal micro-batches; None if there are none yet."""
    given = TrainerOptions(
        batch_size=1, gradient_accumulate_every=2, seq_len=8, use_fsdp=True, warmup_steps=0, max_steps=1, **options
    )
    inputs = PlanInputs(1, "cpu", False, 1, 256, 1, 1 << 30, True, "data")
    plan = with_length(decide_plan(given, inputs, None), given, 2)
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
