"""The models and sequences that are trained on a GPU, and the results of training them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LLAMA_1B: dict[str, Any] = {  # the shape of Llama 3.2 1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
LLAMA_8B: dict[str, Any] = {  # the shape of Llama 3.1 8B
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
LORA_RANK, LORA_ALPHA = 16, 32
WARM_UP_STEPS, MEASURED_STEPS = 2, 8
# Slow steps are measured at least `MIN_MEASURED_STEPS` times, until `MEASURING_SECONDS` have passed.
MIN_MEASURED_STEPS, MEASURING_SECONDS = 2, 12.0


@dataclass(frozen=True)
class GpuWorkload:
    """One model and shape of a batch. Activations are recomputed, and matrices are multiplied in bfloat16."""

    title: str
    shape: dict[str, Any]
    seq_len: int
    batch_size: int
    lora: bool

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size


WORKLOADS = (
    GpuWorkload("1B, all weights, 4k tokens", LLAMA_1B, 4096, 4, lora=False),
    GpuWorkload("1B, all weights, 32k tokens", LLAMA_1B, 32768, 1, lora=False),
    GpuWorkload("8B, LoRA, 4k tokens", LLAMA_8B, 4096, 4, lora=True),
    GpuWorkload("8B, LoRA, 32k tokens", LLAMA_8B, 32768, 1, lora=True),
)
REHEARSAL = (
    GpuWorkload("tiny, all weights", TINY, 32, 4, lora=False),
    GpuWorkload("tiny, LoRA", TINY, 32, 4, lora=True),
)


@dataclass(frozen=True)
class Measurement:
    """The median seconds of a step and the peak of allocated memory in bytes, or the reason why there are none."""

    seconds_per_step: float | None = None
    peak_bytes: int | None = None
    attention: str | None = None
    failure: str | None = None


def build_model(workload: GpuWorkload, device: torch.device, *, attention: str) -> Any:
    """A model with random weights on ``device``: in float32 to train all of them, in bfloat16 as the base of LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if workload.lora else torch.float32)
    try:
        with torch.device(device):
            config: dict[str, Any] = {**workload.shape, "attn_implementation": attention}
            return LlamaForCausalLM(LlamaConfig(**config))
    finally:
        torch.set_default_dtype(before)
