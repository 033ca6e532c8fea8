"""Measures the memory of each rank while DeepSpeed loads and trains a Llama, then trains and resumes a small one.

``zero_memory_script.py RESULT_FILE LARGE SMALL``: the two model directories.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import deepspeed.comm.torch
import torch

from tests.zeta_core.models import llama
from tests.zeta_core.parallel.loading_script import Peak, train
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.data.sources import SourceLocations
from zeta_core.environment import ProcessRank, home, library_environment
from zeta_core.memory.activations import LiveTensors
from zeta_core.memory.estimate import estimate_activations, estimate_memory
from zeta_core.memory.zero_parts import ZeroSettings
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.model.sources import locate_model
from zeta_core.objective.loss import cross_entropy_sum, shifted
from zeta_core.parallel.processes import Processes
from zeta_core.parallel.strategy import build_engine
from zeta_core.parallel.zero import Zero, zero_config
from zeta_core.plan import PlanInputs, decide_plan, with_length

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 16_000,
}
BUCKET = 2_000_000  # values; the default of DeepSpeed is larger than this model


def held_bytes() -> int:
    """The size of all tensors of this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    storages = {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in tensors}
    return sum(storages.values())


def measure(stage: int, processes: Processes) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
    zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    deepspeed: dict[str, Any] = {"zero_optimization": zero}
    options = TrainerOptions.model_validate(
        {
            "use_deepspeed": deepspeed,
            "batch_size": 2,
            "gradient_accumulate_every": 2,
            "seq_len": 256,
            "max_steps": 1,
            "mixed_precision": "bf16",
            "warmup_steps": 0,
        }
    )
    inputs = PlanInputs(processes.world_size, "cpu", True, 1, 256, 1, 1 << 40, True, "data")
    plan = with_length(decide_plan(options, inputs, None), options, 8)
    settings = ZeroSettings.of(zero_config(deepspeed, plan))
    before = held_bytes()
    model = llama(**SHAPE)
    engine = build_engine(model, plan, processes, blocks=repeated_blocks(model), deepspeed=deepspeed)
    ids = torch.zeros(2, 256, dtype=torch.long)
    held = peak = 0
    for _ in range(2):
        for last in (False, True):
            held = held_bytes() - before
            with LiveTensors(engine.module) as live, engine.micro_step(last=last):
                engine.backward(
                    cross_entropy_sum(engine.model(ids, use_cache=False).logits, shifted(ids)) / ids.numel()
                )
            peak = live.peak_bytes
        engine.update(1e-3)

    def build(_: object) -> torch.nn.Module:
        with torch.device("meta"):
            return llama(**SHAPE)

    activations = estimate_activations(build, plan)
    estimate = estimate_memory(build(plan), plan, activations if isinstance(activations, int) else None, zero=settings)
    engine.close()
    return {"held": held, "peak": held + peak, "estimate": estimate.model_dump()}


class Measured(Zero):
    """Ends the measurement when the weights are divided; DeepSpeed then adds its master weights."""

    peak: Peak

    def _divide_weights(self) -> None:
        super()._divide_weights()
        self.used = self.peak.end()


def loading(directory: str, processes: Processes) -> dict[str, int]:
    """The peak of this rank's memory while ZeRO 3 divides a model, and the size of its part."""
    options = TrainerOptions(
        use_deepspeed=3, batch_size=1, gradient_accumulate_every=1, seq_len=8, max_steps=1, warmup_steps=0
    )
    inputs = PlanInputs(processes.world_size, "cpu", False, 1, 256, 1, 1 << 30, True, "data")
    plan = with_length(decide_plan(options, inputs, None), options, processes.world_size)
    located = locate_model(directory, SourceLocations(any_path=True), home() / "cache")
    assert located.build_exact is not None
    Measured.peak = Peak()
    model = located.build_exact()
    engine = Measured(model, plan, processes, blocks=repeated_blocks(model), config=zero_config(3, plan))
    whole = sum(parameter.ds_numel for parameter in cast("Iterator[Any]", engine.module.parameters()))
    engine.close()
    return {"peak": engine.used, "shard": 4 * whole // processes.world_size}


def main(result_file: str, large: str, small: str) -> None:
    folder, rank = Path(result_file).parent, ProcessRank.from_environment()
    deepspeed.comm.torch.build_shm_op = lambda: None  # compiling it takes half a minute; gloo does the same
    with library_environment(home() / "cache", deepspeed=True, cuda=False):
        processes = Processes(rank, need_group=True)
        loading(small, processes)  # imports the libraries
        found: dict[str, Any] = {"loading": processes.gather(loading(large, processes))}
        found["stages"] = [measure(stage, processes) for stage in (2, 3)]
    split = {"use_deepspeed": 3, "batch_size": 12 // rank.world_size, "gradient_accumulate_every": 1}
    train(small, folder, 2, **split)
    found["resumed"] = train(small, folder, 4, **split, resume_from_checkpoint=folder / "run")
    processes.close()
    if rank.is_main:
        Path(result_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
