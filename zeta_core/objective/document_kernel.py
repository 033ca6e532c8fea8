"""Attention within documents by one kernel: torch's flash attention for sequences of different lengths.

It runs on NVIDIA GPUs, in half precision. `kernel_problem` computes a small example on the device, under autocast and
with gradients, before a run relies on it.

Shapes: B sequences, T tokens, N heads, D values of a head; S = B x T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

MAX_HEAD_VALUES = 256  # of flash attention; a head must also have a multiple of 8 values
_TOLERANCE = 4e-2  # of the largest value; rounding to bfloat16 causes up to 1e-2

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Documents:
    """The start and end of each document in each of B rows of ``length`` tokens, on ``device``."""

    rows: list[list[tuple[int, int]]]
    length: int
    device: torch.device

    @property
    def are_whole_rows(self) -> bool:
        return all(row == [(0, self.length)] for row in self.rows)

    @cached_property
    def longest(self) -> int:
        return max(end - start for row in self.rows for start, end in row)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Where each document starts if the rows follow each other, and the number of all tokens, as int32."""
        starts = [at * self.length + start for at, row in enumerate(self.rows) for start, _ in row]
        return torch.tensor([*starts, len(self.rows) * self.length], dtype=torch.int32, device=self.device)


def attend_by_kernel(
    query_BNTD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
    kernel: Kernel = varlen_attn,
) -> torch.Tensor:
    """Causal attention within ``documents`` as (B, T, N, D), in the precision of autocast.

    A token attends to itself and at most ``window`` - 1 tokens before it. ``kernel`` is called as torch's
    `varlen_attn`, the default.
    """
    batch, heads, length, _ = query_BNTD.shape
    dtype = _dtype(query_BNTD)
    # Norms of queries and keys with float32 weights return float32, which autocast doesn't change for this kernel.
    query, key, value = (each.transpose(1, 2).flatten(0, 1).to(dtype) for each in (query_BNTD, key, value))
    output_SND: torch.Tensor = kernel(
        query,
        key,
        value,
        documents.offsets,
        documents.offsets,
        documents.longest,
        documents.longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=key.shape[1] != heads,
    )
    return output_SND.unflatten(0, (batch, length))


def fits_kernel(query_BNTD: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the kernel can compute this attention, on a device where it works."""
    size = query_BNTD.shape[-1]
    is_supported = size == value.shape[-1] and _fits(size)
    return query_BNTD.is_cuda and not dropout and is_supported and _dtype(query_BNTD) != torch.float32


def _fits(head_size: int) -> bool:
    return head_size % 8 == 0 and head_size <= MAX_HEAD_VALUES


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def kernel_problem(device: torch.device, dtype: torch.dtype, head_size: int = 64) -> str | None:
    """Why the kernel can't be used on ``device`` under autocast to ``dtype``; None if it works.

    Some devices compute no gradients for some sizes of heads; sizes that never fit the kernel are not tested. Output
    and gradients of packed documents, with and without a window, are compared with those of masked attention.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return "torch's kernel for documents needs a GPU and half precision"
    documents = Documents([[(0, 40), (40, 64)], [(0, 7), (7, 64)]], 64, device)
    numbers = torch.Generator().manual_seed(0)
    size = head_size if _fits(head_size) else 64
    shapes = ((2, 4, 64, size), (2, 2, 64, size), (2, 2, 64, size))
    try:
        inputs = [torch.randn(shape, generator=numbers).to(device).requires_grad_() for shape in shapes]
        for window in (None, 5):
            found: list[list[torch.Tensor]] = []
            for attend in (attend_by_kernel, attend_by_mask):
                with torch.autocast(device.type, dtype):
                    output = attend(inputs[0], inputs[1], inputs[2], documents, window=window)
                gradients = torch.autograd.grad(output.float().square().sum(), inputs)
                found.append([output.detach().float(), *gradients])
            for ours, expected in zip(*found, strict=True):
                if not bool((ours - expected).abs().amax() <= _TOLERANCE * expected.abs().amax()):
                    return "the results of torch's kernel for documents differ from those of masked attention"
    except Exception as error:  # noqa: BLE001 - a missing kernel raises different errors on different devices
        lines = str(error).strip().splitlines()
        return f"torch's kernel for documents failed: {lines[0] if lines else type(error).__name__}"
    return None


def attend_by_mask(
    query_BNTD: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The same attention with a dense mask, which needs B x T x T values."""
    length, device = documents.length, documents.device
    at = torch.arange(length, device=device)
    allowed_TT = at[:, None] >= at
    if window is not None:
        allowed_TT = allowed_TT & (at[:, None] - at < window)
    starts_BT = torch.zeros(len(documents.rows), length, dtype=torch.long, device=device)
    for row, bounds in enumerate(documents.rows):
        for start, _ in bounds:
            starts_BT[row, start] = 1
    number_BT = starts_BT.cumsum(1)
    mask_B1TT = ((number_BT[:, :, None] == number_BT[:, None, :]) & allowed_TT)[:, None]
    output = F.scaled_dot_product_attention(query_BNTD, key, value, mask_B1TT, scale=scale, enable_gqa=True)
    return output.transpose(1, 2)
