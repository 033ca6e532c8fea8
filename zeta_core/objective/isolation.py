"""Telling a model which tokens of a packed sequence belong to the same document.

Models differ in the arguments that they accept and honor. `isolation_probe` finds the first `Isolation` under which a
document has the same output packed as alone. B sequences, T tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from zeta_core.data.sequences import MicroBatch

Mask = Literal["boolean", "additive"]


@dataclass(frozen=True)
class AttentionSpan:
    """How far back the attention layers of one type look: ``window`` tokens, or to the start of a chunk of ``chunk``.

    ``layer_type`` is the name in the config's ``layer_types``. With neither limit, attention reaches the first token.
    """

    layer_type: str
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Isolation:
    """The arguments that keep the documents of a sequence apart.

    Without ``mask``, the model derives its masks from the positions, which start at 0 in each document: its attention
    windows then keep their effect, and no dense mask is needed. A mask replaces the model's own; with ``spans``, it
    is one mask for each type of attention layer, which contains that type's window.
    """

    positions: bool = False
    mask: Mask | None = None
    spans: tuple[AttentionSpan, ...] = ()

    def arguments(self, batch: MicroBatch) -> dict[str, Any]:
        """The keyword arguments for a batch that has segments."""
        given: dict[str, Any] = {}
        if self.positions:
            given["position_ids"] = batch.positions_BT
        if self.mask is not None:
            allowed_B1TT = _same_document_and_causal(batch)
            if self.spans:
                masks = {span.layer_type: allowed_B1TT & _within(span, batch) for span in self.spans}
                given["attention_mask"] = {name: self._formatted(mask) for name, mask in masks.items()}
            else:
                given["attention_mask"] = self._formatted(allowed_B1TT)
        return given

    def _formatted(self, allowed_B1TT: torch.Tensor) -> torch.Tensor:
        """The boolean mask as it is, or as a term for the attention scores, which eager attention adds."""
        if self.mask == "boolean":
            return allowed_B1TT
        scores = torch.zeros(allowed_B1TT.shape, device=allowed_B1TT.device)
        return scores.masked_fill_(~allowed_B1TT, torch.finfo(scores.dtype).min)


def _same_document_and_causal(batch: MicroBatch) -> torch.Tensor:
    assert batch.segments_BT is not None
    segments_BT = batch.segments_BT
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril_()
    return ((segments_BT[:, :, None] == segments_BT[:, None, :]) & causal_TT)[:, None]


def _within(span: AttentionSpan, batch: MicroBatch) -> torch.Tensor:
    """Whether a layer of this type attends to a token, if it is an earlier token of the same document."""
    positions_BT = batch.positions_BT
    if span.chunk is not None:
        chunks_BT = positions_BT // span.chunk
        return (chunks_BT[:, :, None] == chunks_BT[:, None, :])[:, None]
    if span.window is not None:
        return (positions_BT[:, :, None] - positions_BT[:, None, :] < span.window)[:, None]
    return torch.ones((), dtype=torch.bool, device=positions_BT.device)


def attention_spans(config: Any) -> tuple[AttentionSpan, ...]:
    """The types of attention layers that a Hugging Face config names; empty unless one of them has a window or chunk.

    transformers' models use these names as keys if they accept one mask for each layer type.
    """
    text = text_config(config)
    types = dict.fromkeys(getattr(text, "layer_types", None) or ())
    limits = {
        "full_attention": AttentionSpan("full_attention"),
        "sliding_attention": AttentionSpan("sliding_attention", window=getattr(text, "sliding_window", None)),
        "chunked_attention": AttentionSpan("chunked_attention", chunk=getattr(text, "attention_chunk_size", None)),
    }
    found = tuple(limits[name] for name in types if name in limits)
    limited = any(span.window or span.chunk for span in found)
    return found if limited and len(found) == len(types) else ()


def text_config(config: Any) -> Any:
    """The config of the language model, which composite configs (Gemma 3, Llama 4) contain as a nested config."""
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config
