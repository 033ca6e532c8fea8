"""Attention in passes over tensors without storage: the kernels of GPUs, and no masks for single documents.

On a CPU, torch computes grouped queries with the scores of all pairs of tokens, which the kernels of GPUs never hold.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import masking_utils


@contextmanager
def fused_attention() -> Generator[None]:
    """Within the context, attention has the shapes and the memory of a fused kernel, but meaningless values."""
    original = F.scaled_dot_product_attention

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> torch.Tensor:
        return cast("torch.Tensor", _FusedAttention.apply(query, key, value, attn_mask))

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def single_documents() -> Generator[None]:
    """Within the context, transformers builds no masks that separate the documents of a sequence.

    It finds documents by the values of positions. For tensors without values, it would always build these masks.
    """
    original = masking_utils.find_packed_sequence_indices

    def find_none(position_ids: torch.Tensor) -> torch.Tensor | None:
        return None

    masking_utils.find_packed_sequence_indices = find_none
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


class _FusedAttention(torch.autograd.Function):
    """Saves its inputs, its output, and the logarithm of the sum of each row in float32, as flash attention does."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
