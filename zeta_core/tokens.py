"""Text becomes tokens once: a flat memory-mapped file of ids with the offset of every document, cached by content.

The cache entry of a data set is the directory ``<cache>/tokens-<hash>/`` with ``tokens.bin`` (little-endian uint16 or
uint32), ``offsets.npy`` (int64, one more than there are documents) and ``meta.json``. It is written aside and renamed,
under a file lock, so that of several ranks or jobs one does the work and the others wait for it; what is there is
whole. The hash covers the bytes of the data, the tokenizer, and the version of this format.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from zeta_core.data import Piece, Source
from zeta_core.failures import InvalidData
from zeta_core.report import Report

FORMAT_VERSION = 1
_BATCH_CHARACTERS = 4 << 20  # text given to the tokenizer at once: enough for all its threads

Ids = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class TokenFile:
    """Documents as token ids: document ``d`` is ``ids[offsets[d]:offsets[d + 1]]``, never empty."""

    ids: Ids
    offsets: NDArray[np.int64]
    largest_id: int
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


def prepare_tokens(sources: Sequence[Source], tokenizer: Any, cache: Path, report: Report) -> TokenFile:
    """The tokens of ``sources``, from the cache or made now. Raises `InvalidData` where there are fewer than two."""
    if any(source.flat is not None for source in sources):
        return _flat(sources)
    about = {
        "version": FORMAT_VERSION,
        "tokenizer": fingerprint(tokenizer),
        "sources": [s.fingerprint for s in sources],
    }
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    directory = cache / f"tokens-{key}"
    if not (directory / "meta.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not (directory / "meta.json").is_file():
                _write(sources, tokenizer, directory, report)
    os.utime(directory)  # used now: a worker's cache forgets what nobody uses
    meta = json.loads((directory / "meta.json").read_text())
    ids = np.memmap(directory / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
    offsets = cast("NDArray[np.int64]", np.load(directory / "offsets.npy", mmap_mode="r", allow_pickle=False))
    return TokenFile(cast(Ids, ids), offsets, meta["largest_id"], key)


def _flat(sources: Sequence[Source]) -> TokenFile:
    """A flat file of ids as it lies: ``.npy`` of any unsigned or positive integers, ``.bin`` of little-endian uint16.

    ``<name>.offsets.npy`` beside it holds where each document begins, and the end; without it all is one document.
    """
    if len(sources) > 1:
        raise InvalidData(f"{sources[0].name} is a flat file of ids; give it alone, or all data as rows of input_ids.")
    path, name = sources[0].flat, sources[0].name
    assert path is not None
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False) if name.endswith(".npy") else np.memmap(path, "<u2", "r")
    except (OSError, ValueError) as error:
        raise InvalidData(f"{name} is not readable as a flat file of ids: {error}") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
        raise InvalidData(f"{name} has shape {ids.shape} of {ids.dtype}; give one row of at least two whole numbers.")
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0:
        raise InvalidData(f"{name} holds {smallest}; token ids are not negative.")
    beside = path.with_name(f"{path.stem}.offsets.npy")
    digest = sources[0].fingerprint
    offsets = np.array([0, len(ids)], dtype=np.int64)
    if beside.is_file():
        offsets = np.asarray(np.load(beside, allow_pickle=False)).astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(ids) or not (np.diff(offsets) > 0).all():
            raise InvalidData(f"{beside.name} must rise from 0 to the {len(ids)} ids of {name}.")
        digest += hashlib.sha256(offsets.tobytes()).hexdigest()
    return TokenFile(cast(Ids, ids), offsets, largest, hashlib.sha256(digest.encode()).hexdigest()[:32])


def fingerprint(tokenizer: Any) -> str:
    """What the ids of a tokenizer depend on, as a hash."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    text = f"{type(tokenizer).__name__} {tokenizer.eos_token_id} {inside}"
    return hashlib.sha256(text.encode()).hexdigest()


def _write(sources: Sequence[Source], tokenizer: Any, directory: Path, report: Report) -> None:
    aside = directory.with_name(directory.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    dtype = np.dtype("<u4") if len(tokenizer) > 1 << 16 or any(s.holds_ids for s in sources) else np.dtype("<u2")
    lengths: list[int] = []
    open_length = largest = 0
    with (aside / "tokens.bin").open("wb") as file:
        for ids, ends_document in _encoded(sources, tokenizer, dtype):
            file.write(ids.tobytes())
            open_length += len(ids)
            largest = max(largest, int(ids.max(initial=0)))
            if ends_document and open_length:
                lengths.append(open_length)
                open_length = 0
    num_tokens = sum(lengths)
    if num_tokens < 2:
        names = ", ".join(source.name for source in sources)
        raise InvalidData(f"{names}: holds no text to train on; give at least one document of some words.")
    np.save(aside / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    meta = {"version": FORMAT_VERSION, "dtype": dtype.str, "largest_id": largest, "num_tokens": num_tokens}
    (aside / "meta.json").write_text(json.dumps(meta))
    aside.rename(directory)
    documents = "1 document" if len(lengths) == 1 else f"{len(lengths):,} documents"
    report.log(f"Tokenized {documents} into {num_tokens:,} tokens.")


def _encoded(sources: Sequence[Source], tokenizer: Any, dtype: np.dtype[Any]) -> Iterator[tuple[NDArray[Any], bool]]:
    """Arrays of ids in order, each with whether it ends its document; a document's end token is added there."""
    end = tokenizer.eos_token_id
    closing = np.array([] if end is None else [end], dtype=dtype)
    for source in sources:
        for batch in _batches(source.pieces()):
            for piece, ids in zip(batch, _encode(batch, tokenizer, dtype, source.name), strict=True):
                if piece.ids is not None or not piece.ends_document:
                    yield ids, piece.ends_document
                elif len(ids):
                    yield np.concatenate((ids, closing)), True
                else:
                    yield ids, True


def _encode(batch: list[Piece], tokenizer: Any, dtype: np.dtype[Any], name: str) -> list[NDArray[Any]]:
    if batch[0].ids is not None:
        arrays = [np.asarray(piece.ids, dtype=np.int64) for piece in batch]
        if any(int(array.max(initial=0)) > np.iinfo(dtype).max for array in arrays):
            raise InvalidData(f"{name}: holds token ids of more than 32 bits, which no model has.")
        return [array.astype(dtype) for array in arrays]
    if is_bytes(tokenizer):
        # ByT5's ids are the bytes, three special ids below them (Xue et al. 2021, arXiv 2105.13626, section 3.1).
        return [np.frombuffer(piece.text.encode(), dtype=np.uint8).astype(dtype) + dtype.type(3) for piece in batch]
    rows = tokenizer([piece.text for piece in batch], add_special_tokens=False, return_attention_mask=False)
    return [np.asarray(row, dtype=dtype) for row in rows["input_ids"]]


def is_bytes(tokenizer: Any) -> bool:
    """Whether this is the byte-level tokenizer that needs no files."""
    return type(tokenizer).__name__ == "ByT5Tokenizer"


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 4 * len(piece.ids or ())
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
