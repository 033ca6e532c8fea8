"""Inspecting a built model: its positions, vocabulary, output layer, and the facts from which a run is planned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from zeta_core.contract.identifiers import is_hub_id
from zeta_core.contract.job.advice import Patch
from zeta_core.environment import free_memory_bytes
from zeta_core.failures import InvalidModel
from zeta_core.plan import PlanInputs

POSITION_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "block_size")
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "pos_emb", "pos_embedding", "position_embedding")


def num_positions(model: nn.Module) -> int | None:
    """The maximum number of tokens in a sequence, if the model or its config defines one."""
    for holder in (getattr(model, "config", None), model):
        for name in POSITION_NAMES:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def plan_inputs_without_data(
    model: nn.Module,
    *,
    pretrained: bool,
    world_size: int,
    device: str | None = None,
    supports_bf16: bool = False,
) -> PlanInputs:
    """The facts that are known before the data is read; ``device`` defaults to the one of this process."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        supports_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return PlanInputs(
        world_size=world_size,
        device=device,
        supports_bf16=supports_bf16,
        threads=torch.get_num_threads(),
        positions=num_positions(model),
        values_per_token=values_per_token(model),
        free_bytes=free_memory_bytes(),
        from_scratch=not pretrained,
        data="",
    )


def check_vocabulary(model: nn.Module, largest_id: int, patch: Patch | None) -> None:
    """Raise `InvalidModel` if the data has ids that the model has no embedding for; ``patch`` is the suggested fix."""
    rows = embedding_rows(model)
    if rows is not None and largest_id >= rows:
        raise InvalidModel(
            f"The data contains token id {largest_id}, but the model's embedding has {rows} rows.",
            hint=f"Give the model a vocab_size of at least {largest_id + 1}, or use the tokenizer that belongs to it.",
            patch=patch,
            evidence={"largest_token_id": largest_id, "embedding_rows": rows},
        )


def check_positions(model: nn.Module, seq_len: int) -> None:
    """Raise `InvalidModel` if sequences exceed the position table of a model with learned positions (GPT-2)."""
    limit = num_positions(model)
    learned = any(
        isinstance(part, nn.Embedding) and part.num_embeddings == limit and name.rpartition(".")[2] in _POSITION_TABLES
        for name, part in model.named_modules()
    )
    if limit is not None and seq_len > limit and learned:
        raise InvalidModel(
            f"seq_len is {seq_len}, but the model has only {limit} learned positions.",
            hint=f"Use at most {limit}.",
            patch={"seq_len": limit},
            param="seq_len",
        )


def embedding_rows(model: nn.Module) -> int | None:
    """The number of token ids that the model has an embedding for, if it can be determined."""
    getter = getattr(model, "get_input_embeddings", None)
    if callable(getter):
        try:
            embedding = getter()
        except NotImplementedError:
            embedding = None
        if isinstance(embedding, nn.Embedding):
            return embedding.num_embeddings
    named = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    token = [part for name, part in named if "pos" not in name.lower()]
    return token[0].num_embeddings if token else None


@dataclass(frozen=True)
class ResizedEmbeddings:
    """The number of rows of resized embeddings, and the number ``before``, in the base."""

    rows: int
    before: int


def resized_embeddings(model: nn.Module) -> ResizedEmbeddings | None:
    """Whether ``resize_token_embeddings`` was called after a Hugging Face model was loaded, if that is known."""
    rows, before = embedding_rows(model), _rows_of_base(model)
    return None if rows is None or before is None or rows == before else ResizedEmbeddings(rows, before)


def _rows_of_base(model: nn.Module) -> int | None:
    """The vocabulary in the config that the model was loaded from.

    If that config cannot be found, the inner model's ``vocab_size`` is used, because ``resize_token_embeddings`` only
    changes that of the outer model.
    """
    config = getattr(model, "config", None)
    named = str(getattr(config, "name_or_path", "") or "")
    commit = getattr(config, "_commit_hash", None)
    stored = Path(named) / "config.json" if named and Path(named).is_dir() else None
    if stored is None and commit and is_hub_id(named):
        cached = try_to_load_from_cache(named, "config.json", revision=commit)
        stored = Path(cached) if isinstance(cached, str) else None
    if stored is not None and stored.is_file():
        values = json.loads(stored.read_bytes())
        size = values.get("vocab_size") or (values.get("text_config") or {}).get("vocab_size")
        return size if isinstance(size, int) else None
    inner = getattr(model, "base_model", None)
    before = vars(inner).get("vocab_size") if isinstance(inner, nn.Module) and inner is not model else None
    return before if isinstance(before, int) and vars(model).get("vocab_size") == embedding_rows(model) else None


def is_output_layer(layer: nn.Module, model: nn.Module) -> bool:
    """Whether this linear layer computes the logits: declared by a Hugging Face model, or inferred from its size."""
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        return layer is getter()
    return isinstance(layer, nn.Linear) and layer.out_features == embedding_rows(model)


def values_per_token(model: nn.Module) -> int:
    """A rough count of the activations stored per token: four times the outputs of all linear layers.

    Measured with SmolLM2-135M on a CPU as growth of the resident memory: 2.6 times for all weights, 4 times with LoRA.
    """
    outputs = [part.out_features for part in model.modules() if isinstance(part, nn.Linear)]
    return 4 * sum(outputs) if outputs else sum(p.shape[0] for p in model.parameters() if p.dim() >= 2)


def head_size(model: nn.Module) -> int | None:
    """The number of values of an attention head in the model's config; ``None`` if the config doesn't state it."""
    config: Any = getattr(model, "config", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if isinstance(size := getattr(config, "head_dim", None), int):
        return size
    return width // heads if isinstance(heads, int) and isinstance(width, int) else None
