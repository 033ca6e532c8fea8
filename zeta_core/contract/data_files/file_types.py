"""The types of files that can be trained on, by the suffix of their name in any case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

TEXT_SUFFIXES = (".txt", ".text", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson")  # JSON Lines: one object per line
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (".parquet", ".arrow")
ROW_SUFFIXES = (*LINE_SUFFIXES, ".json", *DELIMITERS, *TABLE_SUFFIXES)
TOKEN_SUFFIXES = (".npy", ".bin")  # nothing but token ids
DATA_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, *TOKEN_SUFFIXES)
MODEL_SUFFIXES = (".tar",)
# A compressed file has the suffix of its content and one of these, such as ``.jsonl.gz``.
COMPRESSIONS = (".gz", ".zst")
COMPRESSIBLE_SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json", *DELIMITERS)


@dataclass(frozen=True)
class FileType:
    """The type of a file by its name; ``compression`` is empty, or one of `COMPRESSIONS`."""

    suffix: str
    compression: str = ""


def file_type(name: str) -> FileType:
    """The type that a name indicates: ``rows.JSONL.gz`` has the suffix ``.jsonl`` and the compression ``.gz``."""
    path = PurePath(name.lower())
    if path.suffix in COMPRESSIONS:
        inner = PurePath(path.stem).suffix
        if inner in COMPRESSIBLE_SUFFIXES:
            return FileType(inner, path.suffix)
    return FileType(path.suffix)


def file_suffixes(data_format: str | None, *, pretokenized: bool = False) -> tuple[str, ...]:
    """The suffixes of the files that can contain data in a format of the spec, without compressions.

    ``auto`` and ``None`` mean text or rows.
    """
    if pretokenized or data_format == "tokens":
        return (*ROW_SUFFIXES, *TOKEN_SUFFIXES)
    return (*ROW_SUFFIXES, *TEXT_SUFFIXES) if data_format in (None, "auto", "text") else ROW_SUFFIXES


def listed(suffixes: Sequence[str]) -> str:
    """Suffixes for a message, with the compressed forms that are accepted too."""
    plain = ", ".join(suffixes)
    if not set(suffixes) & set(COMPRESSIBLE_SUFFIXES):
        return plain
    binary = ", ".join(suffix for suffix in suffixes if suffix not in COMPRESSIBLE_SUFFIXES)
    compressed = f"compressed as {' or '.join(COMPRESSIONS)}"
    return f"{plain} (all but {binary} also {compressed})" if binary else f"{plain} (also {compressed})"
