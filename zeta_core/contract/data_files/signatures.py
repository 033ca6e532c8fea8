"""Recognizing content that does not match a file's name by its first bytes, so that the message names the cause.

Uploads, training data and the files of models are checked with the same table.
"""

from __future__ import annotations

from zeta_core.contract.data_files.file_types import COMPRESSIONS, TABLE_SUFFIXES, TOKEN_SUFFIXES, file_type

FIRST_BYTES = 4096
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: a pointer is shorter than 1024 bytes, and starts with this.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_LARGEST = 1024
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
# The content of files that are often saved or renamed under another name.
_SIGNATURES: dict[bytes, str] = {
    b"\x1f\x8b": "gzip-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"PK\x03\x04": "a ZIP archive",  # also .xlsx, .docx and .npz
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"\x93NUMPY": "a NumPy file",
    b"GGUF": "a GGUF model",
    b"%PDF-": "a PDF file",
    b"SQLite format 3\x00": "an SQLite database",
}
_EXPECTED: dict[str, tuple[str, ...]] = {
    ".gz": ("gzip-compressed",),
    ".zst": ("zstd-compressed",),
    ".parquet": ("a Parquet file",),
    ".arrow": ("an Arrow file", "an Arrow stream"),  # `datasets` writes streams
    ".npy": ("a NumPy file",),
}
_SUFFIXES = {content: suffix for suffix, contents in _EXPECTED.items() for content in contents}


def is_lfs_pointer(first_bytes: bytes) -> bool:
    """Whether a file that starts with these bytes is a Git LFS pointer. Pass at least 1024 bytes if there are any."""
    return first_bytes.startswith(_LFS_POINTER) and len(first_bytes) < _LFS_LARGEST and b"\noid sha256:" in first_bytes


def fault_in_first_bytes(name: str, first_bytes: bytes) -> str | None:
    """The fault of a data file that starts with ``first_bytes``; ``None`` if they may match its name.

    The result completes a sentence that starts with the name. ``first_bytes`` has at most `FIRST_BYTES` bytes.
    """
    if is_lfs_pointer(first_bytes):
        return "is a Git LFS pointer and not the file itself; download the file with `git lfs pull`."
    kind = file_type(name)
    suffix = kind.compression or kind.suffix
    actual = next((content for magic, content in _SIGNATURES.items() if first_bytes.startswith(magic)), None)
    if suffix in _EXPECTED:
        if actual in _EXPECTED[suffix]:
            return None
        content = f"{actual} and " if actual else ""
        return f"is {content}not {_EXPECTED[suffix][0]}; save it in that format, or rename it to match its content."
    if suffix in (*TOKEN_SUFFIXES, *TABLE_SUFFIXES):
        return None  # flat token ids may start with any bytes
    if encoding := _encoding(first_bytes):
        return f"is {encoding} text; save it as UTF-8."
    if actual is not None:
        right = _SUFFIXES.get(actual)
        if right in COMPRESSIONS:
            return f"is {actual}; rename it to {name}{right}, or decompress it."
        return f"is {actual}; " + (f"rename it to end in {right}." if right else "extract or export its text first.")
    if b"\0" in first_bytes:
        return "contains NUL bytes, so it is not UTF-8 text; save it as UTF-8 text."
    return None


def _encoding(first_bytes: bytes) -> str | None:
    """The encoding of text that is not UTF-8: by its byte order mark, or by the positions of NUL bytes."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if first_bytes.startswith(mark):
            return encoding
    # Spaces, digits and line ends have a NUL byte in UTF-16 in every language: at odd positions in little-endian order.
    even, odd = first_bytes[::2].count(0), first_bytes[1::2].count(0)
    if len(first_bytes) >= 4 and max(even, odd) >= len(first_bytes) // 16 + 1 and min(even, odd) == 0:
        return "UTF-16"
    return None
