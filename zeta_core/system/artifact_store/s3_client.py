"""The boto3 client of a bucket, and the translation of its errors.

Credentials come from boto3's own chain: environment variables, ``~/.aws``, roles of containers and machines. The
address of another store than AWS is ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

CONNECTIONS = 16
_DEFAULT_REGION = "us-east-1"  # only part of the signature for stores other than AWS
_ERRNO = {
    "404": errno.ENOENT,
    "NoSuchKey": errno.ENOENT,
    "NoSuchUpload": errno.ENOENT,
    "NoSuchBucket": errno.ENODEV,
    "301": errno.ENODEV,
    "PermanentRedirect": errno.ENODEV,
    "401": errno.EACCES,
    "403": errno.EACCES,
    "AccessDenied": errno.EACCES,
    "ExpiredToken": errno.EACCES,
    "InvalidAccessKeyId": errno.EACCES,
    "InvalidToken": errno.EACCES,
    "SignatureDoesNotMatch": errno.EACCES,
    "412": errno.EEXIST,
    "PreconditionFailed": errno.EEXIST,
    "ConditionalRequestConflict": errno.EEXIST,
    "507": errno.ENOSPC,
    "InsufficientStorage": errno.ENOSPC,
    "QuotaExceeded": errno.EDQUOT,
    "XMinioStorageFull": errno.ENOSPC,
    "XMinioAdminBucketQuotaExceeded": errno.EDQUOT,
}


def open_client(*, checksums: bool) -> Any:
    """A thread-safe S3 client. ``checksums``: send and check them whenever possible, not only where S3 requires it."""
    mode = "when_supported" if checksums else "when_required"
    session = boto3.Session()
    client = session.client("s3", region_name=session.region_name or _DEFAULT_REGION, config=_config(mode))
    if "amazonaws.com" not in client.meta.endpoint_url:
        # Few other stores have a host name for each bucket.
        client = session.client(
            "s3",
            region_name=session.region_name or _DEFAULT_REGION,
            config=_config(mode).merge(Config(s3={"addressing_style": "path"})),
        )
    return client


def _config(checksum_mode: Any) -> Config:
    return Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 4},
        max_pool_connections=CONNECTIONS,
        request_checksum_calculation=checksum_mode,
        response_checksum_validation=checksum_mode,
        signature_version="s3v4",
    )


@contextmanager
def translated_errors(what: str) -> Generator[None]:
    """Raise boto3's errors as `OSError`, with ``what`` in their message; a missing object is a `FileNotFoundError`."""
    try:
        yield
    except ClientError as error:
        response: Any = error.response
        code = str(response.get("Error", {}).get("Code", ""))
        status = str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        number = _ERRNO.get(code) or _ERRNO.get(status, errno.EIO)
        message = str(response.get("Error", {}).get("Message", "")) or "no message"
        raise OSError(number, f"the object store refused {what} ({code or status}: {message})") from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise PermissionError(errno.EACCES, f"{what} failed: {error}") from error
    except (BotoCoreError, HTTPClientError) as error:
        raise OSError(errno.EIO, f"{what} failed: {error}") from error
