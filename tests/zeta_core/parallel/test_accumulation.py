"""Gradient accumulation with FSDP2: between two micro-batches, a process holds its shards of the gradients only."""

from __future__ import annotations

from collections.abc import Iterator

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


def test_fsdp2_reduces_the_gradients_of_each_micro_batch(processes: Processes) -> None:
    options = TrainerOptions(
        batch_size=1, gradient_accumulate_every=2, seq_len=8, use_fsdp=True, warmup_steps=0, max_steps=1
    )
    plan = with_length(
        decide_plan(options, PlanInputs(1, "cpu", False, 1, 256, 1, 1 << 30, True, "data"), None), options, 2
    )
    model = llama()
    engine = build_engine(model, plan, processes, blocks=repeated_blocks(model), deepspeed=None)
    gradients: list[torch.Tensor] = []
    for last in (False, True):
        with engine.micro_step(last=last):
            engine.backward(engine.model(torch.arange(8)[None]).logits.square().mean())
        shards = [parameter.grad for parameter in engine.module.parameters()]
        assert all(isinstance(shard, DTensor) for shard in shards), "they are reduced and sharded"
        gradients.append(torch.cat([shard.to_local().flatten() for shard in shards if isinstance(shard, DTensor)]))
        gradients[-1] = gradients[-1].clone()
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    engine.close()
