"""Reading files that may be compressed, as one stream of bytes.

Compressed data is untrusted: a small file can expand to any size. The stream is decompressed in small pieces, and it
ends with `InvalidData` if the output is out of proportion to the file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from zeta_core.contract.data_files.file_types import file_type
from zeta_core.failures import InvalidData

BUFFER_BYTES = 1 << 18
# Text compresses to about a quarter of its size, and repetitive tables to a fiftieth. The limit allows small files with
# many copies of the same rows.
MAX_RATIO = 200
ALWAYS_ALLOWED_BYTES = 64 << 20
_NAMES = {".gz": "gzip", ".zst": "zstd"}


class ByteStream(io.BufferedReader):
    """The decompressed content of a file. `position` counts bytes of the compressed file."""

    def __init__(self, raw: io.RawIOBase, file: BinaryIO) -> None:
        super().__init__(raw, BUFFER_BYTES)
        self._file = file

    @property
    def position(self) -> int:
        """The number of bytes of the file that have been read, which may be ahead of what was returned."""
        return self._file.tell()


@contextmanager
def open_stream(path: Path, name: str) -> Generator[ByteStream]:
    """Open a file for reading; the suffix of ``name`` determines its compression. Raises `InvalidData` on reading."""
    compression = file_type(name).compression
    with path.open("rb", buffering=0) as file:
        raw = _Decompressed(file, name, compression, path.stat().st_size) if compression else file
        yield ByteStream(raw, file)


class _Decompressed(io.RawIOBase):
    def __init__(self, file: BinaryIO, name: str, compression: str, size: int) -> None:
        super().__init__()
        self._name = name
        self._compression = _NAMES[compression]
        self._size = size
        self._num_read = 0
        self._content = _decompressor(file, compression)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            data = self._content.read(len(buffer))
        except (EOFError, zlib.error, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk failed, not the data
                raise
            raise InvalidData(
                f"{self._name} is not readable as {self._compression} ({error}), so it is probably truncated or "
                "damaged; write or download it again."
            ) from error
        self._num_read += len(data)
        limit = max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * self._size)
        if self._num_read > limit:
            raise InvalidData(
                f"{self._name} decompresses to more than {limit >> 20:,} MiB, over {MAX_RATIO} times its size, "
                "which is rejected as a decompression bomb; if the data is valid, decompress the file yourself."
            )
        buffer[: len(data)] = data
        return len(data)


def _decompressor(file: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
