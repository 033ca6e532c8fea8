"""Parsing ``ZETA_ARTIFACTS_URL``: a folder, or a bucket with an optional prefix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_PREFIX = re.compile(r"[A-Za-z0-9._/-]*\Z")  # characters that every store and program treats alike


@dataclass(frozen=True)
class BucketLocation:
    """A place in a bucket; ``prefix`` is empty or ends with ``/``."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse_location(url: str) -> Path | BucketLocation:
    """The folder of a path or ``file://`` URL, or the bucket of an ``s3://`` URL. Raises `ValueError`."""
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme == "s3":
        return _bucket(url)
    if scheme != "file":
        raise ValueError(f"{scheme}:// is not supported; use s3://bucket/prefix, or a folder that all machines share")
    path = Path(unquote(urlsplit(url).path) if "://" in url else url).expanduser()
    if not path.is_absolute():
        raise ValueError("it must be an absolute path, or file:// and an absolute path")
    return path


def _bucket(url: str) -> BucketLocation:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise ValueError("credentials in the URL are not supported; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if not _BUCKET.match(bucket):
        raise ValueError("the bucket's name must have 3 to 63 lowercase letters, digits, '.' or '-'")
    prefix = prefix.strip("/")
    if not _PREFIX.match(prefix) or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise ValueError("the prefix must consist of letters, digits, '.', '_' and '-', separated by single slashes")
    return BucketLocation(bucket, f"{prefix}/" if prefix else "")
