"""Building small models of an architecture, for testing how the architecture behaves.

Guarantees: every kind of layer that the config names is present, weights are random and in float32 on the CPU, and
the model has at most `MAX_VALUES` parameters. Attention windows and chunks are shortened to `SMALL_WINDOW` tokens, so
short inputs exceed them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zeta_core.objective.isolation import text_config

MAX_VALUES = 40_000_000
SMALL_VOCABULARY = 64
SMALL_WINDOW = 8
_WINDOW = re.compile(r"window|attention_chunk|local_attention")
_NO_WINDOW = re.compile(r"layer|pattern")  # `max_window_layers`, `sliding_window_pattern`
_HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_NARROW = {
    "head_dim": 8,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),  # sequences are padded to a multiple of it
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "moe_intermediate_size", "ffn_dim"), 64),
    "shared_expert_intermediate_size": 64,
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k"), 2),
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def small_model(model: nn.Module) -> nn.Module | None:
    """A small model of the same class as ``model``, which may have no storage; None if none can be built."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    for shrink in (_fewer_layers, _narrower):
        try:
            config = shrink(model.config)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in type(model)(config).parameters())
            if size <= MAX_VALUES:
                with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                    torch.manual_seed(0)
                    return type(model)(config).float()
        except Exception:  # noqa: BLE001, S112 - the config can't be shrunk this way; the next way may work
            continue
    return None


def attention_windows(config: Any) -> dict[str, int]:
    """The fields of a config, and of the configs nested in it, that limit how many tokens attention looks back."""
    return {name: value for part in _parts(config) for name, value in vars(part).items() if _is_window(name, value)}


def _is_window(name: str, value: object) -> bool:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return is_number and _WINDOW.search(name) is not None and _NO_WINDOW.search(name) is None


def _parts(config: Any) -> Iterator[Any]:
    from transformers import PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        return
    yield config
    for value in list(vars(config).values()):
        yield from _parts(value)


def _fewer_layers(config: Any) -> Any:
    """The fewest first layers that include all kinds of layers, with a small vocabulary and short windows."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        _shorten(part)
        for name, value in list(vars(part).items()):
            if _is_window(name, value):
                setattr(part, name, min(value, SMALL_WINDOW))
    text = text_config(small)
    for part in {id(part): part for part in (small, text)}.values():
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(part, name, None)
    text.vocab_size = SMALL_VOCABULARY
    return small


def _shorten(config: Any) -> None:
    """Keep the fewest first layers, but at least two, that have all values of every list with one value per layer."""
    count = next((count for name in _LAYER_COUNTS if (count := _int(config, name))), 0)
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count and count > 0
    }
    kept = min(2, count)
    for values in lists.values():
        kept = max(kept, *(values.index(value) + 1 for value in values))
    for name in _LAYER_COUNTS:
        if _int(config, name):
            setattr(config, name, kept)
    for name, values in lists.items():
        setattr(config, name, values[:kept])


def _narrower(config: Any) -> Any:
    """The same with eight values for each attention head, narrow feed-forward layers, and few experts."""
    small = _fewer_layers(config)
    for part in _parts(small):
        heads = next((heads for name in _HEAD_COUNTS if (heads := _int(part, name))), 0)
        if not heads:
            continue
        for name, value in {**dict.fromkeys(_WIDTHS, 8 * heads), **_NARROW}.items():
            current = _int(part, name)
            if current > value and not isinstance(getattr(type(part), name, None), property):
                setattr(part, name, value)
        if inner := _int(part, "mamba_expand") * _int(part, "hidden_size"):  # the total width of Mamba 2's heads
            part.mamba_d_head = max(1, inner // max(1, _int(part, "mamba_n_heads")))
    return small


def _int(config: Any, name: str) -> int:
    """The number in this field of a config, or 0."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
