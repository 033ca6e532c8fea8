"""``python -m benchmarks.memory_table [--check]``: prints the page ``docs/operations/memory.md``.

The memory of Llama shapes with 1, 8 and 70 billion parameters is estimated as ``zeta validate`` does, for one sequence
of 4,096 tokens with activation checkpointing. ``--check`` compares the estimates with training steps on tensors
without storage, which takes about ten minutes, and adds the largest difference.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.harness.fake_training import peak_of_a_rank
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.data.sources import SourceLocations
from zeta_core.memory.estimate import building, estimate_activations, estimate_memory
from zeta_core.memory.micro_batch import USED_SHARE
from zeta_core.memory.zero_parts import ZeroSettings
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.sources import locate_model
from zeta_core.parallel.zero import zero_config
from zeta_core.plan import Plan, PlanInputs, decide_plan, with_length

SEQ_LEN = 4096
CARDS = (24, 48, 80, 141)  # GB
NUM_GPUS = (1, 2, 8)
MODELS: dict[str, tuple[int, int, int, int, int]] = {  # hidden, intermediate, layers, heads, heads of keys and values
    "1B": (2048, 8192, 16, 32, 8),
    "8B": (4096, 14336, 32, 32, 8),
    "70B": (8192, 28672, 80, 64, 8),
}
VOCABULARY = 128_256
STRATEGIES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO 2": {"use_deepspeed": 2},
    "ZeRO 3": {"use_deepspeed": 3},
    "FSDP2": {"use_fsdp": True},
    "FSDP2 offloaded": {"use_fsdp": True, "fsdp_cpu_offload": True},
}
TRAINED: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora": {"r": 16}},
    "QLoRA": {"lora": {"r": 16, "quantize": "nf4"}},
}


@dataclass(frozen=True)
class Case:
    model: str
    trained: str
    strategy: str
    num_gpus: int

    @property
    def is_possible(self) -> bool:
        if self.strategy == "FSDP2 offloaded":
            return self.trained != "QLoRA"
        quantized = "quantize" in TRAINED[self.trained].get("lora", {})
        if self.num_gpus == 1:
            return self.strategy == "DDP"
        return self.strategy in ("DDP", "FSDP2") or not quantized


def cases() -> Iterator[Case]:
    for model in MODELS:
        for trained in TRAINED:
            for strategy in STRATEGIES:
                for num_gpus in NUM_GPUS:
                    case = Case(model, trained, strategy, num_gpus)
                    if case.is_possible:
                        yield case


def run_of(case: Case) -> tuple[LocatedModel, Plan, ZeroSettings | None]:
    """The model, the plan and the settings of ZeRO."""
    hidden, intermediate, layers, heads, key_heads = MODELS[case.model]
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": case.model == "1B",
    }
    split = {"batch_size": 1, "gradient_accumulate_every": 8, "seq_len": SEQ_LEN, "mixed_precision": "bf16"}
    given = {**split, **STRATEGIES[case.strategy], **TRAINED[case.trained], "use_activation_checkpointing": True}
    options = TrainerOptions.model_validate({"max_steps": 1, "warmup_steps": 0, **given})
    located = locate_model(ConfigModel(config=config), SourceLocations(any_path=True), Path("unused"))
    located = replace(located, pretrained=True, dtype=torch.bfloat16)
    inputs = PlanInputs(case.num_gpus, "cuda", True, 1, None, 1, 1 << 40, False, "data")
    plan = with_length(decide_plan(options, inputs, None), options, 8)
    zero = ZeroSettings.of(zero_config(options.use_deepspeed, plan)) if options.use_deepspeed else None
    return located, plan, zero


def estimated_bytes(case: Case, traced: dict[Case, int]) -> int:
    """``traced`` contains the activations of equal passes: only FSDP2's depend on the number of GPUs."""
    located, plan, zero = run_of(case)
    key = case if plan.strategy == "fsdp2" else replace(case, strategy=plan.strategy, num_gpus=1)
    if key not in traced:
        found = estimate_activations(building(located), plan, on_gpu=True)
        assert isinstance(found, int), found
        traced[key] = found
    total = estimate_memory(building(located)(plan), plan, traced[key], zero=zero).total
    assert total is not None
    return total


def is_counted(case: Case) -> bool:
    """Whether the case is compared with a step: not DeepSpeed's, and one of the equal ones under DDP."""
    return case.strategy == "FSDP2" or (case.strategy == "DDP" and case.num_gpus == 1)


def smallest_card(size: int) -> str:
    fits = next((card for card in CARDS if size <= USED_SHARE * card * 1e9), None)
    return "none" if fits is None else f"{fits} GB"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.3g} GB"


def page(sizes: dict[Case, int], difference: float | None) -> str:
    lines = [
        "# What fits on which GPUs",
        "",
        "The smallest GPU that can train each Llama shape, with the estimated memory of each GPU: AdamW, bfloat16 "
        f"computation, activation checkpointing, and micro-batches of one sequence of {SEQ_LEN:,} tokens. An estimate "
        f"may use {100 * USED_SHARE:.0f} % of a GPU of 24, 48, 80 or 141 GB; the rest is for temporary buffers, "
        "fragmentation and the CUDA context. `zeta validate SPEC` estimates your own job. "
        "`python -m benchmarks.memory_table --check` prints this page.",
        "",
        "| model | trained | strategy | " + " | ".join(f"{n} GPU{'s' if n > 1 else ''}" for n in NUM_GPUS) + " |",
        "|---|---|---|" + "---|" * len(NUM_GPUS),
    ]
    for model in MODELS:
        for trained in TRAINED:
            for strategy in STRATEGIES:
                row = [Case(model, trained, strategy, number) for number in NUM_GPUS]
                if not any(case in sizes for case in row):
                    continue
                cells = [
                    f"{smallest_card(sizes[case])} ({gigabytes(sizes[case])})" if case in sizes else "–" for case in row
                ]
                lines.append(f"| {model} | {trained} | {strategy} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "A single GPU has no strategy; its figures are in the rows of DDP, which holds the whole model on each GPU. "
        "FSDP2 and ZeRO 3 divide everything over the GPUs, ZeRO 2 gradients and optimizer state. Only FSDP2 "
        "divides a 4-bit base. FSDP2 offloaded (`fsdp_cpu_offload`) holds the shards in the memory of the hosts, which "
        "needs 16 bytes per weight if all are trained, and about 2 with LoRA: 1,129 GB and 144 GB for 70B. Weights "
        "are trained in float32 (4 bytes for each weight, its gradient, and each of two moments), and an adapter's "
        "base stays in bfloat16 or 4 bits.",
    ]
    if difference is not None:
        lines += [
            "",
            "The estimates for DDP, FSDP2 and adapters were compared with steps of the real sharding and optimizer on "
            f"tensors without storage, counted by torch's `MemTracker`: they differ by at most {100 * difference:.1f} "
            "%. DeepSpeed can't run without storage, so its estimates were compared with smaller models only "
            "([decision 0071](../decisions/0071-estimates-of-memory.md)).",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with training steps on tensors without storage")
    check = parser.parse_args(arguments).check
    sizes: dict[Case, int] = {}
    traced: dict[Case, int] = {}
    difference: float | None = None
    for case in cases():
        started = time.perf_counter()
        sizes[case] = estimated_bytes(case, traced)
        found = f"{sizes[case] / 1e9:.1f} GB"
        if check and is_counted(case):
            located, plan, _ = run_of(case)
            counted = peak_of_a_rank(located, plan)
            difference = max(difference or 0.0, abs(sizes[case] / counted - 1))
            found += f", counted {counted / 1e9:.1f} GB"
        print(f"{case}: {found} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    print(page(sizes, difference), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
