"""Checks that the header of a safetensors file matches the file.

The format: eight bytes with the header's length, the header (JSON: name to dtype, shape and offsets), then the data,
without gaps. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
from typing import Any, BinaryIO, TypeGuard, cast

from zeta_core.contract.model_json.faults import InvalidModelFiles
from zeta_core.contract.model_json.json_files import MAX_BYTES, parse_object

# Bits of one element (safetensors 0.8).
DTYPE_BITS = {
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
MAX_DIMENSIONS = 64
FIX = "save the model with save_pretrained, which writes safetensors"


def check_header(stream: BinaryIO, num_bytes: int, file: str) -> None:
    """Raise `InvalidModelFiles` unless the header describes exactly the bytes that follow it."""
    length = int.from_bytes(stream.read(8), "little")
    first = stream.read(1)
    if num_bytes < 10 or first != b"{":
        raise InvalidModelFiles(f"{file} is not a safetensors file; {FIX}.")
    if length > min(num_bytes - 8, MAX_BYTES):
        raise InvalidModelFiles(
            f"{file} has {num_bytes} bytes, but claims a header of {length} (the limit is {MAX_BYTES}); {FIX}."
        )
    header = parse_object(first + stream.read(length - 1), f"The header of {file}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidModelFiles(f"{file} has a __metadata__ that is not an object of strings; {FIX}.")
    end = 0
    for name, begin, end_of_tensor in sorted(
        ((name, *_span(about, name, file)) for name, about in header.items()), key=lambda span: (span[1], span[2])
    ):
        if begin != end:
            raise InvalidModelFiles(f"{file} has {name[:200]!r} at byte {begin} instead of {end}; {FIX}.")
        end = end_of_tensor
    if 8 + length + end != num_bytes:
        raise InvalidModelFiles(
            f"{file} has {num_bytes} bytes, but its header describes {8 + length + end}; it is truncated or damaged."
        )


def _span(about: object, name: str, file: str) -> tuple[int, int]:
    """The begin and end of a tensor in the data."""
    entry = cast("dict[str, Any]", about) if isinstance(about, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise InvalidModelFiles(
            f"{file} has {name[:200]!r} of dtype {str(dtype)[:40]!r}, which is not supported; {FIX}."
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise InvalidModelFiles(f"{file} has {name[:200]!r} with a malformed shape or data_offsets; {FIX}.")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * bits:
        raise InvalidModelFiles(
            f"{file} has {name[:200]!r} of shape {str(shape)[:80]} and dtype {dtype} in {end - begin} bytes, which "
            f"does not match; {FIX}."
        )
    return begin, end


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    return all(type(item) is int and 0 <= item < 1 << 63 for item in items)
