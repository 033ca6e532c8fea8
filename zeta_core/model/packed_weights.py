"""Weights in 4 bits, packed into one tensor of bytes that can be sharded, copied and gathered as a whole.

The format is that of Dettmers et al. 2023 (arXiv 2305.14314): a weight is one of 16 values (nf4), 64 weights share a
scale, and the scales are quantized to 8 bits in groups of 256 ("double quantization"): 4.127 bits per weight.
bitsandbytes quantizes and dequantizes, and keeps these parts in several tensors. Here they follow each other in one:

| part                           | type    | number                                  |
|--------------------------------|---------|-----------------------------------------|
| scales of the groups of scales | float32 | 1 for 256 scales                        |
| mean of the scales             | float32 | 1, subtracted before they are quantized |
| zeros                          | float32 | up to 3                                 |
| weights                        | 4 bits  | 2 in each byte                          |
| scales                         | 8 bits  | 1 for 64 weights                        |

The zeros align the weights to 16 bytes, because the library's kernels for GPUs load that many bytes at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from typing import Any, cast

import torch

BLOCK_WEIGHTS = 64  # weights that share a scale
GROUP_SCALES = 256  # scales that share a second-level scale in float32
_ALIGNMENT = 4  # numbers in float32
_PIECE_WEIGHTS = 1 << 18  # quantized at a time, because the kernel for CPUs needs 40 bytes for each of them


def packed_bytes(num_weights: int) -> int:
    """The size of a packed tensor with this number of weights."""
    groups, scales = _num_scales(num_weights)
    return 4 * _num_floats(groups) + -(-num_weights // 2) + scales


def num_packed_weights(size: int) -> int:
    """The even number of weights in a packed tensor of ``size`` bytes; `packed_bytes` grows with every second one."""
    return 2 * bisect_left(range(size + 1), size, key=lambda half: packed_bytes(2 * half))


def pack(weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Quantize ``weight`` from ``dtype`` to a tensor of bytes on ``device``; without storage if it has none."""
    if weight.is_meta:
        return torch.empty(packed_bytes(weight.numel()), dtype=torch.uint8, device="meta")
    import bitsandbytes.functional

    library: Any = bitsandbytes.functional
    flat = weight.detach().flatten()
    packed = torch.zeros(packed_bytes(flat.numel()), dtype=torch.uint8, device=device)
    group_scales, mean, codes, scales = _parts(packed, flat.numel())
    exact_scales = torch.empty(scales.numel(), dtype=torch.float32, device=device)
    for start in range(0, flat.numel(), _PIECE_WEIGHTS):
        piece = flat[start : start + _PIECE_WEIGHTS].to(device=device, dtype=dtype)
        found, state = library.quantize_4bit(piece, blocksize=BLOCK_WEIGHTS, quant_type="nf4")
        codes[start // 2 :][: found.numel()] = found.flatten()
        exact_scales[start // BLOCK_WEIGHTS :][: state.absmax.numel()] = state.absmax
    mean.fill_(exact_scales.mean())
    found, state = library.quantize_blockwise(exact_scales - mean, code=_tables(device)[1], blocksize=GROUP_SCALES)
    scales.copy_(found)
    group_scales.copy_(state.absmax)
    return packed


def unpack(packed: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The weights of a packed tensor, dequantized to ``dtype``."""
    import bitsandbytes.functional

    library: Any = bitsandbytes.functional
    codes, state = quant_state(packed, shape, dtype)
    return cast(torch.Tensor, library.dequantize_4bit(codes, state))


def quant_state(packed: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """The 4-bit values and their ``QuantState``, which are the arguments of functions of bitsandbytes.

    They are views of ``packed``, so they are valid as long as it is.
    """
    import bitsandbytes.functional

    library: Any = bitsandbytes.functional
    group_scales, mean, codes, scales = _parts(packed, shape.numel())
    weight_values, scale_values = _tables(packed.device)
    second = library.QuantState(absmax=group_scales, code=scale_values, blocksize=GROUP_SCALES, dtype=torch.float32)
    state = library.QuantState(
        absmax=scales,
        shape=shape,
        code=weight_values,
        blocksize=BLOCK_WEIGHTS,
        quant_type="nf4",
        dtype=dtype,
        offset=mean,
        state2=second,
    )
    return codes.view(-1, 1), state


def _parts(packed: torch.Tensor, num_weights: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the scales of groups, the mean of the scales, the 4-bit values and the scales."""
    groups, _ = _num_scales(num_weights)
    start = 4 * _num_floats(groups)
    end = start + -(-num_weights // 2)
    numbers = packed[:start].view(torch.float32)
    return numbers[:groups], numbers[groups], packed[start:end], packed[end:]


def _num_scales(num_weights: int) -> tuple[int, int]:
    """The numbers of groups of scales, and of scales."""
    scales = -(-num_weights // BLOCK_WEIGHTS)
    return -(-scales // GROUP_SCALES), scales


def _num_floats(groups: int) -> int:
    """The scales of the groups, the mean, and the zeros behind them."""
    return -(-(groups + 1) // _ALIGNMENT) * _ALIGNMENT


@lru_cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 values of a weight, and the 256 values of a scale. They must not depend on the modes of the caller."""
    import bitsandbytes.functional
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    library: Any = bitsandbytes.functional
    with unset_fake_temporarily(), torch.device("cpu"):
        tables = library.get_4bit_type("nf4", device="cpu"), library.create_dynamic_map()
        return tables[0].to(device), tables[1].to(device)
