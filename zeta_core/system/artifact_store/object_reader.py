"""Reading an object of a bucket like a file: from any position, and across interrupted connections."""

from __future__ import annotations

import errno
import io
import threading
import time
from typing import Any

from botocore.exceptions import BotoCoreError, HTTPClientError
from urllib3.exceptions import HTTPError

from zeta_core.system.artifact_store.s3_client import translated_errors

RETRY_SECONDS = 60.0  # how long reading is retried while the store does not respond
PAUSE_SECONDS = 0.5
_LASTING = frozenset({errno.ENOENT, errno.EACCES, errno.EEXIST, errno.ENODEV})  # errors that no retry resolves


class ObjectReader(io.RawIOBase):
    """One object as it was when it was opened; replacing it in the meantime ends the reading with an error.

    Reading is sequential from the position of the last `seek`, with one request. Raises `OSError`.
    """

    def __init__(self, client: Any, bucket: str, key: str, head: dict[str, Any]) -> None:
        """``head`` is the response to a HEAD request for the object."""
        self.num_bytes = int(head["ContentLength"])
        self._client = client
        self._object = {"Bucket": bucket, "Key": key, "IfMatch": str(head["ETag"])}
        self._position = 0
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}[whence]
        position = max(0, base + offset)
        if position != self._position:
            self._position = position
            self._drop()
        return position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.num_bytes - self._position)
        if wanted <= 0:
            return 0
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                piece = self._read(wanted)
            except OSError as error:
                self._drop()
                if error.errno in _LASTING or time.monotonic() >= deadline:
                    raise
                threading.Event().wait(PAUSE_SECONDS)
                continue
            buffer[: len(piece)] = piece
            self._position += len(piece)
            return len(piece)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, wanted: int) -> bytes:
        what = f"reading {self._object['Key']}"
        with translated_errors(what):
            if self._body is None:
                byte_range = f"bytes={self._position}-{self.num_bytes - 1}"
                self._body = self._client.get_object(**self._object, Range=byte_range)["Body"]
            try:
                piece = self._body.read(wanted)
            except (HTTPError, BotoCoreError, HTTPClientError) as error:
                raise OSError(errno.EIO, f"{what} failed: {error}") from error
        if not piece:
            raise OSError(errno.EIO, f"{what} failed: the connection ended early")
        return piece

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()
