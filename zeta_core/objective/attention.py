"""Choosing the implementation of a Hugging Face model's attention, and attention without masks for packed documents.

transformers' scaled dot-product attention separates the documents of a packed sequence by a dense (B, 1, T, T) mask,
and computes all T x T scores. `document_attention` computes each document by itself: there is no mask, and the work
grows with the lengths of the documents instead of the length of the sequence. The documents follow from the positions,
which start at 0 in each of them. On GPUs in half precision, one kernel computes all documents (`document_kernel`).

Shapes: B sequences, T tokens, N heads, D values of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zeta_core.failures import CannotTrain
from zeta_core.objective.document_kernel import Documents, attend_by_kernel, fits_kernel

DOCUMENTS = "zeta_documents"  # the name of `document_attention` in transformers
# transformers' names, if they differ from those of the option `attn_implementation`
_NAMES = {"varlen": DOCUMENTS, "flex": "flex_attention"}
_FLASH = ("flash_attention_2", "flash_attention_3")


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Generator[None]:
    """Let ``model`` use this value of `attn_implementation`; "auto" leaves its own. It is restored afterwards.

    Raises `CannotTrain` if the model or this machine does not support it.
    """
    if name == "auto":
        yield
        return
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise _unsupported(name, f"{type(model).__name__} is not a model of transformers")
    if not torch.cuda.is_available() and name in (*_FLASH, "flex"):
        raise _unsupported(name, "it needs a GPU")
    _register()
    wanted, before = _NAMES.get(name, name), current_attention(model)
    if wanted == before:
        yield
        return
    try:
        model.set_attn_implementation(wanted)
    except (ImportError, ValueError) as error:
        raise _unsupported(name, str(error).strip().splitlines()[0].rstrip(".")) from error
    if current_attention(model) != wanted:  # transformers only logs that a model has a fixed implementation
        raise _unsupported(name, f"{type(model).__name__} has a fixed implementation")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def current_attention(model: nn.Module) -> str:
    """transformers' name of the implementation that the model uses now; empty for other models."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name if isinstance(name, str) else ""


def _unsupported(name: str, why: str) -> CannotTrain:
    return CannotTrain(f"attn_implementation is {name!r}, which can't be used: {why}.", hint="Omit it, or use 'auto'.")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(DOCUMENTS, document_attention)
    AttentionMaskInterface.register(DOCUMENTS, _mask)


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **values: Any) -> torch.Tensor | None:
    """No mask, unless some tokens are masked (padding in a batch of prompts)."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=False, **values)


def document_attention(
    module: nn.Module,
    query_BNTD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **values: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document, as (B, T, N, D), with the signature of transformers' functions.

    Raises `ValueError` for what it doesn't compute: soft caps, attention sinks, biases of positions. With a mask, or a
    cache of earlier tokens, it is scaled dot-product attention.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if values.get(name) is not None]
    if unsupported:
        raise ValueError(f"attention within documents does not support {unsupported[0]}")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query_BNTD.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or not causal or length == 1 or length != key.shape[2]:
        output, _ = sdpa_attention_forward(
            module, query_BNTD, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        )
        return output, None
    documents = _documents(position_ids, len(query_BNTD), length, query_BNTD.device)
    window = sliding_window if sliding_window is not None and sliding_window < documents.longest else None
    if (window or not documents.are_whole_rows) and fits_kernel(query_BNTD, value, dropout):
        return attend_by_kernel(query_BNTD, key, value, documents, scale=scaling, window=window), None
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if key.shape[1] != query_BNTD.shape[1]:
        options["enable_gqa"] = True

    def attend(row: slice, start: int, end: int) -> torch.Tensor:
        part = (row, slice(None), slice(start, end))
        mask = None
        if window is not None and window < end - start:
            mask = _window_mask(end - start, window, query_BNTD.device)
        return F.scaled_dot_product_attention(
            query_BNTD[part], key[part], value[part], attn_mask=mask, is_causal=mask is None, **options
        )

    if documents.are_whole_rows:
        output_BNTD = attend(slice(None), 0, length)
    else:
        output_BNTD = torch.cat(
            [
                torch.cat([attend(slice(number, number + 1), start, end) for start, end in row], dim=2)
                for number, row in enumerate(documents.rows)
            ]
        )
    return output_BNTD.transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Whether each token of a document attends to each other: itself and the ``window`` - 1 before it."""
    every_TT = torch.ones(length, length, dtype=torch.bool, device=device)
    return every_TT.tril().triu(1 - window)


@dataclass
class _LatestPositions:
    """The documents of the latest positions; every layer of a model gets the same tensor."""

    tensor: weakref.ref[torch.Tensor] | None = None
    version: int = 0
    documents: Documents | None = None


_latest = _LatestPositions()


def _documents(position_ids: torch.Tensor | None, num_rows: int, length: int, device: torch.device) -> Documents:
    """The documents of each row; a row without positions is one document."""
    if position_ids is None:
        return Documents([[(0, length)]] * num_rows, length, device)
    if position_ids.dim() != 2:
        raise ValueError("attention within documents needs one position for each token")
    version = position_ids._version  # pyright: ignore[reportPrivateUsage]
    found = _latest.documents
    is_latest = _latest.tensor is not None and _latest.tensor() is position_ids and _latest.version == version
    if found is None or not is_latest or len(found.rows) != num_rows or found.device != device:
        rows = [_bounds_of(row, length) for row in (position_ids == 0).tolist()]
        found = Documents(rows if len(rows) == num_rows else rows * num_rows, length, device)
        _latest.tensor, _latest.version, _latest.documents = weakref.ref(position_ids), version, found
    return found


def _bounds_of(begins: list[bool], length: int) -> list[tuple[int, int]]:
    starts = sorted({0, *(at for at, is_first in enumerate(begins) if is_first)})
    return list(zip(starts, [*starts[1:], length], strict=True))
