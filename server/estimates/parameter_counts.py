"""Counts the parameters of a model from its config. A worker counts those of all other models.

Only the model types below are supported, and only configs that contain every required number: defaults of a type are
not guessed. The formulas follow the modules of ``transformers.models.{llama,mistral,qwen2,gpt2}``; a test compares them
with the real models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _Unknown(Exception):
    """The config lacks a number, so the default of its type applies."""


class _Config:
    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def number(self, name: str) -> int:
        """A required number. Raises `_Unknown`."""
        value = self._values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _Unknown(name)
        return value

    def number_or(self, name: str, default: int) -> int:
        return default if self._values.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise _Unknown(name)
        return value


def count_parameters(config: dict[str, Any]) -> int | None:
    """The number of parameters, counting tied ones once; ``None`` if the config doesn't determine it."""
    formula = _FORMULAS.get(str(config.get("model_type")))
    if formula is None:
        return None
    try:
        return formula(_Config(config))
    except _Unknown:
        return None


def _llama(config: _Config, *, query_bias: bool | None = None, kv_heads_default: bool = True) -> int:
    """Grouped-query attention, a gated MLP and RMS norms; ``query_bias`` overrides the config for q, k and v."""
    hidden, heads = config.number("hidden_size"), config.number("num_attention_heads")
    kv_heads = (
        config.number_or("num_key_value_heads", heads) if kv_heads_default else config.number("num_key_value_heads")
    )
    width = config.number_or("head_dim", hidden // heads)
    inner, vocabulary = config.number("intermediate_size"), config.number("vocab_size")
    all_bias = query_bias is None and config.flag("attention_bias", False)
    attention = hidden * width * (2 * heads + 2 * kv_heads)
    if query_bias or all_bias:
        attention += width * (heads + 2 * kv_heads)
    if all_bias:
        attention += hidden
    mlp = 3 * hidden * inner
    if query_bias is None and config.flag("mlp_bias", False):
        mlp += 2 * inner + hidden
    embeddings = vocabulary * hidden * (1 if config.flag("tie_word_embeddings", False) else 2)
    return embeddings + config.number("num_hidden_layers") * (attention + mlp + 2 * hidden) + hidden


def _mistral(config: _Config) -> int:
    return _llama(config, query_bias=False, kv_heads_default=False)


def _qwen2(config: _Config) -> int:
    return _llama(config, query_bias=True, kv_heads_default=False)


def _gpt2(config: _Config) -> int:
    width = config.number("n_embd")
    inner = config.number_or("n_inner", 4 * width)
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * inner + inner + width
    vocabulary = config.number("vocab_size") * (1 if config.flag("tie_word_embeddings", True) else 2)
    layers = config.number("n_layer") * (attention + mlp + 4 * width)
    return width * (vocabulary + config.number("n_positions")) + layers + 2 * width


_FORMULAS: dict[str, Callable[[_Config], int]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
}
