"""Reading flat files of token ids in place: ``.npy``, and ``.bin`` without a declared type.

Guarantee: a ``.bin`` file is read with the type that `dataset.dtype`, its index file or its header states, or with the
only type that its contents allow; otherwise it is rejected. A wrong type would not raise an error later: 32-bit ids
that are read as 16-bit ids become twice as many ids, and every second one is 0 (karpathy/llm.c#701).

Known layouts, in addition to plain ids as nanoGPT writes them (uint16):

- llm.c, ``dev/data/data_common.py``: a header of 256 int32: a magic number, a version, and the number of ids. The magic
  number 20240520 (version 1) stands for uint16, 20240801 (version 7) for uint32. Because some programs write the first
  number with 32-bit ids, the type is derived from the number of ids and the size of the file.
- Megatron-LM, ``megatron/core/datasets/indexed_dataset.py``: ``<name>.idx`` next to ``<name>.bin`` contains the type,
  the lengths of the sequences, and the documents that they belong to.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from zeta_core.data.sources import Source
from zeta_core.data.tokens.token_file import Ids, TokenFile
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter

_LLMC_HEADER_BYTES = 256 * 4
_LLMC_MAGIC = (20240520, 20240801)
_LLMC_EVALUATION = 20240522
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_OTHER_FILES = {
    b"\x93NUMPY": "a NumPy array; rename it to .npy",
    b"PK\x03\x04": "a ZIP archive, such as torch.save writes; write the ids themselves",
    b"\x1f\x8b\x08": "compressed with gzip; decompress it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it",
    _MEGATRON_MAGIC: "an index of Megatron-LM; use the .bin file that belongs to it",
}
_PIECE_BYTES = 1 << 23
_FEWEST_IDS = 16  # the contents of a file with fewer ids prove nothing
_MAX_HIGH_WORD = 15  # of a 32-bit id: no vocabulary has more than 2**20 entries
_CLEAR_DIFFERENCE = 0.5


@dataclass(frozen=True)
class _Layout:
    """How a file is read. ``reason`` completes "its type is known from"; ``offsets`` are the bounds of documents."""

    dtype: np.dtype[Any]
    reason: str
    start_bytes: int = 0
    offsets: NDArray[np.int64] | None = None


class OutOfTime(Exception):
    """The file could not be read before the deadline."""


def flat_tokens(sources: list[Source], report: Reporter, deadline: float = math.inf) -> TokenFile:
    """Use a flat file of ids in place. Raises `OutOfTime` at the ``deadline``, as `time.monotonic` counts.

    ``<name>.offsets.npy`` in the same folder contains the start of each document, and the end of the last one. Without
    it, and without an index of Megatron-LM, all ids are one document.
    """
    source = next(source for source in sources if source.flat is not None)
    if len(sources) > 1:
        raise InvalidData(
            f"{source.name} is a flat file of ids, which cannot be combined with other sources; use it alone, or "
            "provide all data as rows of input_ids."
        )
    path, name, digest = source.flat, source.name, source.fingerprint
    assert path is not None
    starts: NDArray[np.int64] | None = None
    if Path(name).suffix.lower() == ".npy":
        ids = _numpy_array(path, name)
        if source.dtype is not None and ids.dtype != np.dtype(source.dtype):
            raise InvalidData(f"dataset.dtype is {source.dtype!r}, but {name} contains {ids.dtype}; remove dtype.")
    else:
        layout = _layout(path, name, source.dtype, deadline)
        ids, starts = _mapped(path, name, layout), layout.offsets
        report.log(f"{name} is read as {len(ids):,} ids of type {layout.dtype}, known from {layout.reason}.")
        if layout.dtype != np.uint16 or layout.start_bytes:
            digest += f" {layout.dtype.str} {layout.start_bytes}"
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
        raise InvalidData(
            f"{name} has shape {ids.shape} and type {ids.dtype}; provide a vector of at least two integers."
        )
    smallest, largest = _extremes(ids, deadline)
    if smallest < 0:
        raise InvalidData(
            f"{name} contains {smallest} as {ids.dtype}; token ids must not be negative. Remove masked tokens, or "
            "provide rows of input_ids and labels."
        )
    if largest >= 1 << 31:
        raise InvalidData(
            f"{name} contains {largest} as {ids.dtype}, which is not a token id; set dataset.dtype to the type that "
            "the file was written with."
        )
    offsets = _offsets(path, name, len(ids))
    offsets = starts if offsets is None else offsets
    if offsets is None:
        offsets = np.array([0, len(ids)], dtype=np.int64)
    else:
        digest += hashlib.sha256(offsets.tobytes()).hexdigest()
    fingerprint = hashlib.sha256(digest.encode()).hexdigest()[:32]
    is_raw = Path(name).suffix.lower() != ".npy"
    return TokenFile(cast(Ids, ids), offsets, largest, fingerprint, flat=name if is_raw else None)


@dataclass(frozen=True)
class IdType:
    """The type of the ids of a ``.bin`` file, which may be too narrow for a vocabulary."""

    file: str
    dtype: str

    @staticmethod
    def of(tokens: TokenFile) -> IdType | None:
        return None if tokens.flat is None else IdType(tokens.flat, str(tokens.ids.dtype))

    def check(self, embedding_rows: int | None) -> None:
        """Raise `InvalidData` for 16-bit ids and a vocabulary that they cannot represent."""
        if np.dtype(self.dtype).itemsize > 2 or embedding_rows is None or embedding_rows <= 1 << 16:
            return
        raise InvalidData(
            f"{self.file} is read as {self.dtype}, which cannot represent the {embedding_rows:,} ids of the model's "
            "vocabulary; write the file with 32-bit ids and set dataset.dtype to 'uint32', or provide a .npy file."
        )


def _extremes(ids: NDArray[Any], deadline: float) -> tuple[int, int]:
    """The smallest and the largest id."""
    smallest, largest = int(ids[0]), int(ids[0])
    for piece in _pieces(ids, deadline):
        smallest, largest = min(smallest, int(piece.min())), max(largest, int(piece.max()))
    return smallest, largest


def _pieces(array: NDArray[Any], deadline: float) -> Iterator[NDArray[Any]]:
    """The array in parts of `_PIECE_BYTES`. Raises `OutOfTime`."""
    size = _PIECE_BYTES // array.dtype.itemsize
    for start in range(0, len(array), size):
        if time.monotonic() > deadline:
            raise OutOfTime
        yield array[start : start + size]


def _numpy_array(path: Path, name: str) -> NDArray[Any]:
    """Map an array without reading it, because its header may declare any shape. Raises `InvalidData`."""
    try:
        return cast("NDArray[Any]", np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, OverflowError, SyntaxError, RecursionError, MemoryError) as error:
        raise InvalidData(
            f"{name} is not readable as a flat file of ids: {error}. If it contains ids alone, rename it to .bin "
            "and set dataset.dtype."
        ) from error


def _mapped(path: Path, name: str, layout: _Layout) -> NDArray[Any]:
    size = path.stat().st_size - layout.start_bytes
    if size % layout.dtype.itemsize:
        raise InvalidData(
            f"{name} has {size:,} bytes of ids, which is not a multiple of the {layout.dtype.itemsize} bytes of "
            f"{layout.dtype}; set dataset.dtype to the type that the file was written with, or write it again."
        )
    return np.memmap(path, layout.dtype, "r", offset=layout.start_bytes)


def _offsets(path: Path, name: str, num_ids: int) -> NDArray[np.int64] | None:
    beside = path.with_name(f"{path.stem}.offsets.npy")
    if not beside.is_file():
        return None
    given = _numpy_array(beside, beside.name)
    valid = given.ndim == 1 and given.dtype.kind in "iu" and len(given) > 1
    offsets = given.astype(np.int64) if valid else np.empty(0, np.int64)
    if not valid or offsets[0] != 0 or offsets[-1] != num_ids or not (np.diff(offsets) > 0).all():
        raise InvalidData(f"{beside.name} must increase from 0 to {num_ids}, the number of ids in {name}.")
    return offsets


# --- The type of the ids ----------------------------------------------------------------------------------------------


def _layout(path: Path, name: str, requested: str | None, deadline: float) -> _Layout:
    """Find out how a ``.bin`` file is read. Raises `InvalidData` if that is not certain."""
    declared = _from_header(path, name) or _from_index(path, name)
    if declared is not None:
        if requested is not None and declared.dtype != np.dtype(requested).newbyteorder("<"):
            raise InvalidData(
                f"dataset.dtype is {requested!r}, but {declared.reason} of {name} means {declared.dtype}; remove dtype."
            )
        return declared
    contents = _Contents.of(path, deadline)
    if requested is not None:
        dtype = np.dtype(requested).newbyteorder("<")
        wider = contents.wider_than(dtype.itemsize)
        if wider is not None:
            raise InvalidData(
                f"dataset.dtype is {requested!r}, but {name} {wider}. Set dataset.dtype to the type that the file was "
                "written with; if the ids really are so, provide them as a .npy file."
            )
        return _Layout(dtype, "dataset.dtype")
    with path.open("rb") as file:
        start = file.read(16)
    for magic, what in _OTHER_FILES.items():
        if start.startswith(magic):
            raise InvalidData(f"{name} is {what}.")
    if path.stat().st_size % 2:
        raise InvalidData(
            f"{name} has an odd number of bytes, so it does not contain 16-bit ids; set dataset.dtype to the type that "
            "it was written with."
        )
    if contents.is_64_bit:
        return _Layout(np.dtype("<i8"), "its contents: three of four 16-bit words are 0")
    if contents.is_32_bit:
        return _Layout(np.dtype("<u4"), "its contents: every second 16-bit word is 0 or small")
    doubt = contents.wider_than(2)
    if doubt is not None:
        raise InvalidData(
            f"{name} does not state the type of its ids, and {doubt}. Set dataset.dtype to the type that it was "
            "written with, such as 'uint32'."
        )
    return _Layout(np.dtype("<u2"), "its contents, as there is no header or index")


def _from_header(path: Path, name: str) -> _Layout | None:
    """The layout according to a header of llm.c."""
    with path.open("rb") as file:
        header = file.read(_LLMC_HEADER_BYTES)
    if len(header) < _LLMC_HEADER_BYTES:
        return None
    magic, version, num_ids = struct.unpack("<3i", header[:12])
    if version not in (1, 7) or magic not in (*_LLMC_MAGIC, _LLMC_EVALUATION):
        return None
    if magic == _LLMC_EVALUATION:
        raise InvalidData(f"{name} is an evaluation file of llm.c with multiple-choice questions; use a training file.")
    rest = path.stat().st_size - _LLMC_HEADER_BYTES
    for dtype in ("<u2", "<u4"):
        if num_ids > 0 and rest == num_ids * np.dtype(dtype).itemsize:
            return _Layout(np.dtype(dtype), "the header of llm.c", _LLMC_HEADER_BYTES)
    raise InvalidData(
        f"{name} has a header of llm.c for {num_ids:,} ids, but {rest:,} bytes of ids, which is neither 2 nor 4 per "
        "id; the file is incomplete, so write it again."
    )


def _from_index(path: Path, name: str) -> _Layout | None:
    """The layout and documents according to an index of Megatron-LM next to the file."""
    beside = path.with_suffix(".idx")
    if not beside.is_file():
        return None
    content = np.memmap(beside, np.uint8, "r") if beside.stat().st_size else np.empty(0, np.uint8)
    head = content[:34].tobytes()
    damaged = InvalidData(f"{beside.name} is not an index of Megatron-LM that matches {name}; write or remove it.")
    if len(head) < 34 or not head.startswith(_MEGATRON_MAGIC):
        raise damaged
    version, code, num_sequences, num_bounds = struct.unpack("<QBQQ", head[9:])
    dtype = _MEGATRON_TYPES.get(code, "unknown")
    if version != 1 or len(content) < 34 + 12 * num_sequences + 8 * num_bounds or not num_bounds:
        raise damaged
    if dtype in ("float32", "float64", "unknown"):
        raise InvalidData(f"{beside.name} declares the type {dtype}; token ids must be integers.")
    lengths = np.frombuffer(content, "<i4", num_sequences, 34)
    bounds = np.frombuffer(content, "<i8", num_bounds, 34 + 12 * num_sequences)
    ends = np.cumsum(np.concatenate(([0], lengths)), dtype=np.int64)
    if not (lengths >= 0).all() or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
        raise damaged
    if int(ends[-1]) * np.dtype(dtype).itemsize != path.stat().st_size:
        raise damaged
    offsets = np.unique(ends[bounds])  # without empty documents
    return _Layout(np.dtype(dtype).newbyteorder("<"), "the index of Megatron-LM", 0, offsets)


@dataclass(frozen=True)
class _Contents:
    """Shares of 16-bit words by their position in 64 bits.

    ``zero`` words are 0, ``small`` ones can be the upper half of a 32-bit id, and ``ones`` have all bits set, like the
    upper half of a negative number.
    """

    num_bytes: int
    zero: tuple[float, ...]
    small: tuple[float, ...]
    ones: tuple[float, ...]

    @staticmethod
    def of(path: Path, deadline: float) -> _Contents:
        num_bytes = path.stat().st_size
        words = np.memmap(path, "<u2", "r", shape=(num_bytes // 2,)) if num_bytes > 1 else np.empty(0, np.uint16)
        zero, small, ones = np.zeros(4), np.zeros(4), np.zeros(4)
        for piece in _pieces(words, deadline):
            for at in range(4):
                column = piece[at::4]
                zero[at] += np.count_nonzero(column == 0)
                small[at] += np.count_nonzero(column <= _MAX_HIGH_WORD)
                ones[at] += np.count_nonzero(column == 0xFFFF)
        counts = np.maximum(1, [len(words[at::4]) for at in range(4)])
        zero, small, ones = (tuple((each / counts).tolist()) for each in (zero, small, ones))
        return _Contents(num_bytes, zero, small, ones)

    @property
    def is_64_bit(self) -> bool:
        high = self.zero[2] == self.zero[3] == 1
        return high and self.num_bytes % 8 == 0 and self.num_bytes >= 8 * _FEWEST_IDS and self._are_high((1,), (0,))

    @property
    def is_32_bit(self) -> bool:
        enough = self.num_bytes % 4 == 0 and self.num_bytes >= 4 * _FEWEST_IDS
        return enough and not self._looks_64_bit and self._are_high((1, 3), (0, 2))

    @property
    def _looks_64_bit(self) -> bool:
        """Whether every second 32-bit number is 0 or -1, and the others are not."""
        fits = self.num_bytes % 8 == 0 and self.num_bytes >= 16
        return fits and all(self.zero[at] + self.ones[at] == 1 for at in (2, 3)) and self.zero[0] < 1

    def _are_high(self, high: tuple[int, ...], low: tuple[int, ...]) -> bool:
        """Whether the words at ``high`` are the upper halves of ids, and those at ``low`` the lower halves."""
        zeros = all(self.zero[at] == 1 for at in high) and all(self.zero[at] <= _CLEAR_DIFFERENCE for at in low)
        small = all(self.small[at] == 1 for at in high) and all(self.small[at] <= _CLEAR_DIFFERENCE for at in low)
        return zeros or small

    def wider_than(self, itemsize: int) -> str | None:
        """The evidence that the ids are wider than ``itemsize``, as the end of a sentence, or ``None``."""
        if itemsize == 4 and self._looks_64_bit:
            return "every second 32-bit number is 0, as in a file of 64-bit ids"
        if itemsize > 2:
            return None
        high = [a + b for a, b in zip(self.small, self.ones, strict=True)]
        zeros, highs = (
            (each[1] + each[3] - each[0] - each[2]) / 2 for each in (self.zero, high)
        )  # how much more frequent they are in the upper halves of 32 bits
        clear = self.num_bytes >= 4 * _FEWEST_IDS and max(abs(zeros), abs(highs)) >= _CLEAR_DIFFERENCE
        only_zeros = self.num_bytes % 4 == 0 and self.zero[1] + self.zero[3] == 2 > self.zero[0] + self.zero[2]
        if clear or only_zeros or self._looks_64_bit:
            return "about every second 16-bit word is 0 or small, as in a file of 32-bit or 64-bit ids"
        return None
