"""Estimates of memory, compared with training steps on tensors without storage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.fake_training import peak_of_a_rank
from tests.zeta_core.models import LLAMA_CONFIG
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.data.sources import SourceLocations
from zeta_core.memory.estimate import building, copying, estimate_run
from zeta_core.memory.micro_batch import micro_batch_tokens
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.sources import locate_model
from zeta_core.objective.isolation import Isolation
from zeta_core.plan import Plan, PlanInputs, SequenceStats, decide_plan, with_length

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
}


def run_of(config: dict[str, Any], *, processes: int = 1, **options: Any) -> tuple[LocatedModel, Plan]:
    given = {"batch_size": 2, "gradient_accumulate_every": 2, "seq_len": 1024, "mixed_precision": "bf16", **options}
    checked = TrainerOptions.model_validate({"max_steps": 1, "warmup_steps": 0, **given})
    located = locate_model(ConfigModel(config=config), SourceLocations(any_path=True), Path("unused"))
    if checked.lora is not None:  # a pretrained base, which keeps its precision
        located = replace(located, pretrained=True, dtype=torch.bfloat16)
    inputs = PlanInputs(processes, "cuda", True, 1, None, 1, 1 << 40, True, "data")
    return located, with_length(decide_plan(checked, inputs, None), checked, 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "one process": {},
    "float32": {"mixed_precision": "no"},
    "recomputing": {"use_activation_checkpointing": True},
    "recomputing selectively": {"use_activation_checkpointing": "selective"},
    "LoRA": {"lora": {"r": 8}},
    "QLoRA": {"lora": {"r": 8, "quantize": "nf4"}},
    "FSDP2": {"use_fsdp": True, "processes": 8},
    "FSDP2 recomputing": {"use_fsdp": True, "processes": 2, "use_activation_checkpointing": True},
    "FSDP2 float32": {"use_fsdp": True, "processes": 4, "mixed_precision": "no"},
    "FSDP2 keeping gradients": {"use_fsdp": True, "processes": 4, "fsdp_keep_gradients": True},
    "FSDP2 bf16 states": {"use_fsdp": True, "processes": 4, "optimizer_states": "bf16"},
    "8-bit states": {"optimizer_states": "8bit"},
    "FSDP2 8-bit states": {"use_fsdp": True, "processes": 4, "optimizer_states": "8bit"},
    "FSDP2 QLoRA": {"use_fsdp": True, "processes": 8, "lora": {"r": 8, "quantize": "nf4"}},
    "bf16 weights": {"bf16_weights": "stochastic", "optimizer_states": "bf16"},
    "FSDP2 bf16 weights": {"use_fsdp": True, "processes": 4, "bf16_weights": "kahan"},
    "FSDP2 LoRA": {"use_fsdp": True, "processes": 8, "lora": {"r": 8}},
}
QUICK = ("FSDP2",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.extended) for name in OPTIONS]
)
def test_the_estimate_is_within_ten_percent_of_a_step_without_storage(name: str) -> None:
    located, plan = run_of(SMALL, **OPTIONS[name])
    estimate = estimate_run(building(located), plan, on_gpu=True)
    assert estimate.total is not None
    assert estimate.total == pytest.approx(peak_of_a_rank(located, plan), rel=0.1)


def test_recomputing_more_and_offloading_need_less_memory() -> None:
    activations = list[int]()
    for how in (False, "selective", True, "offload"):
        located, plan = run_of(SMALL, use_activation_checkpointing=how)
        found = estimate_run(building(located), plan, on_gpu=True).activations
        assert found is not None
        activations.append(found)
    assert activations == sorted(activations, reverse=True)
    inputs = 4 * plan.batch_size * plan.seq_len * SMALL["hidden_size"] * SMALL["num_hidden_layers"]
    assert activations[2] - activations[3] == pytest.approx(inputs, rel=0.2), "the inputs of the blocks, in float32"


def test_masks_of_packed_documents_are_part_of_the_estimate() -> None:
    located, plan = run_of(SMALL, seq_len=2048)
    without = estimate_run(building(located), plan, on_gpu=True).activations
    assert without is not None
    for isolation in (Isolation(mask="boolean"), Isolation(positions=True)):
        masked = estimate_run(building(located), plan, on_gpu=True, isolation=isolation).activations
        assert masked is not None
        assert masked - without >= plan.batch_size * plan.seq_len**2, "one byte for each pair of tokens"


@pytest.mark.extended
def test_micro_batches_have_as_many_tokens_as_fit_into_the_memory() -> None:
    located, plan = run_of(SMALL, use_activation_checkpointing=True)
    capacity = 4_000_000_000
    short, long = (micro_batch_tokens(building(located), plan, length, capacity) for length in (512, 2048))
    assert short is not None
    assert long is not None
    assert short == pytest.approx(long, rel=0.25), "the number of tokens counts, and not that of sequences"
    for length, tokens in ((512, short), (2048, long)):
        chosen = replace(plan, batch_size=tokens // length, seq_len=length)
        total = estimate_run(building(located), chosen, on_gpu=True).total
        assert total is not None
        assert 0.7 * capacity < total < 0.9 * capacity
    assert micro_batch_tokens(building(located), plan, 512, 10) == 512, "at least one sequence"


def test_the_default_micro_batch_is_divided_by_the_length_of_sequences_and_its_origin_recorded() -> None:
    def split(device: str = "cuda", *, longest: int, tokens: int | None = None, **options: Any) -> tuple[int, str]:
        stats = {True: SequenceStats(10_000, longest)}
        inputs = PlanInputs(
            1, device, True, 1, None, 1000, 1 << 40, True, "data", micro_batch_tokens=tokens, stats_by_packing=stats
        )
        plan = decide_plan(TrainerOptions.model_validate({"seq_len": longest, **options}), inputs, None)
        assert plan.global_batch == plan.batch_size * plan.gradient_accumulate_every
        return plan.batch_size, plan.batch_size_origin

    assert split(longest=1024, tokens=16_384) == (16, "estimated_memory")
    assert split(longest=4096, tokens=16_384) == (4, "estimated_memory")
    assert split(longest=256, tokens=16_384) == (32, "global_batch")
    assert split(longest=65_536, tokens=16_384) == (1, "estimated_memory")
    assert split(longest=1024) == (32, "global_batch"), "unknown"
    assert split(longest=1024, tokens=16_384, batch_size=5) == (5, "given")
    assert split("cpu", longest=1024) == (8, "estimated_memory")
    assert split("cpu", longest=2048) == (4, "estimated_memory")
    assert split("cpu", longest=256) == (32, "global_batch")


def test_a_loaded_model_has_the_same_estimate_and_is_not_changed() -> None:
    located, plan = run_of(LLAMA_CONFIG, lora={"r": 4}, seq_len=32)
    model = located.build()
    assert estimate_run(copying(model, located), plan) == estimate_run(building(located), plan)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())
