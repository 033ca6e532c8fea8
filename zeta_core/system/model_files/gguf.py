"""Checks that the header of a GGUF file matches the file, before a library follows its counts, lengths and offsets.

The format: magic, version, the numbers of tensors and of metadata values, the values, the descriptions of the tensors,
and their data from the next multiple of the alignment on. See
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import BinaryIO, Final

from zeta_core.contract.model_json.faults import InvalidModelFiles

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
# By number: the elements and the bytes of one block (`GGML_QUANT_SIZES` of the package gguf).
TENSOR_TYPES: Final = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    9: (32, 40),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
    40: (64, 36),
    41: (128, 18),
}
_SCALAR_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MAX_NESTING = 4  # of arrays
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_KEY_BYTES = 65_535
_SKIP_BYTES = 1 << 20
_MAX_VALUES, _MAX_TENSORS = 1 << 16, 1 << 20
_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = b"general.alignment", 32, 1 << 20


def check_gguf_header(stream: BinaryIO, num_bytes: int, file: str) -> None:
    """Raise `InvalidModelFiles` unless everything that the header describes lies within the file."""
    _Header(stream, num_bytes, file).check()


class _Header:
    def __init__(self, stream: BinaryIO, num_bytes: int, file: str) -> None:
        self._stream, self._num_bytes, self._file = stream, num_bytes, file
        self._at = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def check(self) -> None:
        if self._read(4, "magic") != MAGIC:
            raise InvalidModelFiles(f"{self._file} is not a GGUF file; save the model again.")
        version = self._number("<I", "version")
        if version not in VERSIONS:
            raise self._fault(f"has version {version}; only versions 2 and 3 (little-endian) are supported")
        num_tensors, num_values = self._number("<Q", "number of tensors"), self._number("<Q", "number of values")
        if num_tensors > _MAX_TENSORS or num_values > _MAX_VALUES:
            raise self._fault(f"claims {num_tensors} tensors and {num_values} metadata values, more than any model has")
        for _ in range(num_values):
            key = self._string("key", limit=_MAX_KEY_BYTES)
            self._skip_value(key)
        spans = sorted(self._tensor_span() for _ in range(num_tensors))
        for (_, end), (begin, _) in pairwise(spans):
            if begin < end:
                raise self._fault(f"has overlapping tensors at byte {begin} of its data")
        end = self._aligned(self._at) + max((end for _, end in spans), default=0)
        if num_tensors and end > self._num_bytes:
            raise self._fault(
                f"has {self._num_bytes} bytes, but its header describes {end}; it is truncated or damaged"
            )

    def _skip_value(self, key: bytes) -> None:
        kind = self._number("<I", "type of a value")
        if key != _ALIGNMENT_KEY:
            self._skip_values(kind, 1, nesting=0)
            return
        alignment = self._number("<I", "alignment") if kind == _UINT32 else 0
        if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._fault("has an alignment that is not a power of two")
        self._alignment = alignment

    def _skip_values(self, kind: int, count: int, *, nesting: int) -> None:
        """Skip ``count`` values of a type."""
        if kind in _SCALAR_BYTES:
            self._skip(count * _SCALAR_BYTES[kind], "values")
        elif kind == _STRING:
            for _ in range(self._possible(count, 8)):
                self._skip(self._number("<Q", "length of a string"), "string")
        elif kind == _ARRAY and nesting < _MAX_NESTING:
            for _ in range(self._possible(count, 12)):
                inner, length = self._number("<I", "type of an array"), self._number("<Q", "length of an array")
                self._skip_values(inner, length, nesting=nesting + 1)
        else:
            raise self._fault(f"has a metadata value of the unknown type {kind}")

    def _tensor_span(self) -> tuple[int, int]:
        """The begin and the end of the next tensor in the data."""
        name = self._string("name of a tensor", limit=_MAX_KEY_BYTES).decode("utf-8", "replace")[:100]
        num_dimensions = self._number("<I", "number of dimensions")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self._fault(f"has {name!r} with {num_dimensions} dimensions; at most {_MAX_DIMENSIONS} are possible")
        shape = [self._number("<Q", "dimension") for _ in range(num_dimensions)]
        kind, offset = self._number("<I", "type of a tensor"), self._number("<Q", "offset of a tensor")
        if kind not in TENSOR_TYPES:
            raise self._fault(f"has {name!r} of type {kind}, which is not supported")
        block, block_bytes = TENSOR_TYPES[kind]
        if (shape[0] if shape else 1) % block:
            raise self._fault(f"has {name!r} with rows of {shape[0]} elements, which is not a multiple of {block}")
        if offset % self._alignment:
            raise self._fault(f"has {name!r} at byte {offset}, which is not a multiple of {self._alignment}")
        return offset, offset + math.prod(shape) // block * block_bytes

    def _string(self, what: str, *, limit: int) -> bytes:
        length = self._number("<Q", f"length of a {what}")
        if length > limit:
            raise self._fault(f"has a {what} of {length} bytes; at most {limit} are possible")
        return self._read(length, what)

    def _number(self, form: str, what: str) -> int:
        return int(struct.unpack(form, self._read(struct.calcsize(form), what))[0])

    def _possible(self, count: int, each: int) -> int:
        """``count``, if so many values of at least ``each`` bytes may follow."""
        self._require(count * each, "values")
        return count

    def _read(self, size: int, what: str) -> bytes:
        self._require(size, what)
        content = self._stream.read(size)
        if len(content) != size:
            raise self._fault("has become shorter while it was read")
        self._at += size
        return content

    def _skip(self, size: int, what: str) -> None:
        self._require(size, what)
        self._at += size
        while size > 0:  # the stream of a file in an archive can't seek
            skipped = len(self._stream.read(min(size, _SKIP_BYTES)))
            if not skipped:
                return  # the file has become shorter; the next read fails
            size -= skipped

    def _require(self, size: int, what: str) -> None:
        left = self._num_bytes - self._at
        if size > left:
            raise self._fault(
                f"claims {size} bytes for its {what}, but only {left} are left; it is truncated or damaged"
            )

    def _aligned(self, position: int) -> int:
        return -(-position // self._alignment) * self._alignment

    def _fault(self, what: str) -> InvalidModelFiles:
        return InvalidModelFiles(f"{self._file} {what}; download or convert the model again.")
