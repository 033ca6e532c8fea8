"""Tiny models that the tests train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 384  # the size of the byte-level tokenizer's vocabulary

LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values = {name: value for name, value in {**LLAMA_CONFIG, **changes}.items() if name != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**values))


def mixture(kind: str) -> Any:
    """A mixture of three experts, whose matrices are stacked in one parameter."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {name: value for name, value in LLAMA_CONFIG.items() if name != "model_type"}
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3))
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **sizes,
            intermediate_size_mlp=64,
            num_key_value_heads=2,
            num_local_experts=3,
            interleave_moe_layer_step=1,
            head_dim=16,
            pad_token_id=0,
        )
    )


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class PlainModel(nn.Module):
    """Returns logits that depend on a single token. Embedding and head are tied."""

    def __init__(self, width: int = 16, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Skipping(PlainModel):
    """Has a layer that is never called, and an expert that is called only for the rare tokens above 200."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(4, 4)
        self.expert = nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        if (sent := ids > 200).any():
            x = x.masked_scatter(sent[..., None], self.expert(x[sent]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Routed(PlainModel):
    """Chooses a path for each sequence, which may omit blocks, repeat them, or change their order."""

    PATHS = ((0, 1), (2,), (3, 2, 2))

    def __init__(self) -> None:
        super().__init__(depth=4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        chosen = ids.sum(1) % len(self.PATHS)
        parts = [x.new_zeros(0, *x.shape[1:])]
        rows = [chosen.new_zeros(0)]
        for number, path in enumerate(self.PATHS):
            some = (chosen == number).nonzero().flatten()
            if not len(some):
                continue
            part = x[some]
            for block in path:
                part = self.blocks[block](part)
            parts.append(part)
            rows.append(some)
        return self.head(torch.cat(parts)[torch.cat(rows).argsort()])


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class ExpertsBlock(nn.Module):
    """A router and eight experts. An expert is called only if the batch has tokens for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, 8, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        shares = self.router(normed).softmax(-1)
        best, chosen = shares.max(-1)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            sent = chosen == number
            if sent.any():
                found = found.masked_scatter(sent[..., None], expert(normed[sent]) * best[sent][:, None])
        return x + found


class Experts(PlainModel):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ExpertsBlock(16) for _ in range(2))
        self.unreached = nn.Linear(4, 4)


def skipping() -> Skipping:
    torch.manual_seed(0)
    return Skipping()


def routed() -> Routed:
    torch.manual_seed(0)
    return Routed()


def experts() -> Experts:
    torch.manual_seed(0)
    return Experts()


class Summing(PlainModel):
    """Sees all earlier tokens of a sequence, and cannot isolate packed documents."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids).cumsum(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def summing() -> Summing:
    torch.manual_seed(0)
    return Summing()


def plain(dropout: float = 0.0) -> PlainModel:
    torch.manual_seed(0)
    return PlainModel(dropout=dropout)


class WithLabels(PlainModel):
    """Returns a mean loss, and shifts the labels itself."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = super().forward(ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class WithTargets(PlainModel):
    """Like nanoGPT: returns logits of the last position only, unless it gets shifted targets."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, ids: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = super().forward(ids)
        if targets is None:
            return logits[:, [-1]], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


class WithReturnLoss(PlainModel):
    """Like Zeta's wrappers: returns the loss of a whole sequence if ``return_loss`` is set."""

    def forward(self, ids: torch.Tensor, return_loss: bool = False) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = super().forward(ids[:, :-1])
        if not return_loss:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
