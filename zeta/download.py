"""Downloading a checkpoint to a local folder. Downloads are verified, atomic per file, and can be resumed.

Guarantees:
- A file gets its final name only when it is complete and its SHA-256 matches the manifest.
- An interrupted download continues where it stopped (``NAME.part``).
- ``manifest.json`` is written last, so a folder with a manifest contains all requested files.
- Nothing is written outside the folder, whatever paths the manifest contains.
- An existing file with different content is not replaced unless ``overwrite`` is set.

Concurrent downloads into the same folder are not supported.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import httpx

from zeta.transport import HttpTransport
from zeta_core.contract.errors import Conflict, InvalidRequest, NotFound, Unavailable, ZetaError
from zeta_core.contract.job.checkpoint import Manifest, ManifestFile
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, MERGED_NAME, TRAINING_STATE_NAME
from zeta_core.system.durable_files import flush, part_path, rename_durably, write_durably

CHUNK_BYTES = 1 << 20
MAX_ATTEMPTS = 2


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class Corrupt(ZetaError):
    """The downloaded bytes do not match the manifest, even after a second attempt."""

    type = "corrupt_error"
    code = "sha256_mismatch"


@dataclass(frozen=True)
class DownloadProgress:
    """The bytes downloaded so far, of all requested files; ``file`` is the current one."""

    file: str
    bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Download:
    """The result of a download. The SHA-256 of each file was verified in this call."""

    directory: Path
    manifest: Manifest
    files: tuple[ManifestFile, ...]


def download(
    transport: HttpTransport,
    job_id: str,
    manifest: Manifest,
    directory: Path,
    *,
    include: tuple[str, ...],
    state: bool,
    merged: bool = False,
    overwrite: bool,
    on_progress: Callable[[DownloadProgress], None] | None,
) -> Download:
    """Download the selected files of a checkpoint; with ``merged``, only the merged model of an adapter.

    Raises `NotFound` if no file matches the globs, `Conflict` for an existing file with different content,
    `Unavailable` if the disk is full, `Corrupt` if a file fails verification repeatedly, and `Unreachable` if the
    server cannot be reached.
    """
    whole, url = manifest, f"/v1/jobs/{job_id}/checkpoints/{manifest.name}/files/"
    if merged:
        manifest = _merged(manifest, job_id)
    files = tuple(file for file in manifest.files if _is_selected(file, include, state))
    if not files:
        raise NotFound(
            f"No file of {manifest.name} matches {', '.join(include) or 'the request'}; it has "
            f"{', '.join(file.path for file in manifest.files) or 'no files'}."
        )
    manifest_bytes = transport.request("GET", url + MANIFEST_NAME).content
    if Manifest.model_validate_json(manifest_bytes) != whole:
        raise Conflict(f"{manifest.name} of {job_id} was replaced during the download; download it again.")
    if merged:
        manifest_bytes, url = manifest.model_dump_json(indent=1).encode(), f"{url}{MERGED_NAME}/"
    total_bytes = sum(file.size for file in files)
    done_bytes = 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        targets = {file.path: _local_path(directory, file.path) for file in files}
        _require_free_space(directory, files, targets)
        if not overwrite:
            _require_same(directory / MANIFEST_NAME, manifest_bytes)
        for file in files:
            before = done_bytes

            def report(file_bytes: int, file: ManifestFile = file, before: int = before) -> None:
                if on_progress is not None:
                    on_progress(DownloadProgress(file.path, before + file_bytes, total_bytes))

            _fetch_verified(transport, url, file, targets[file.path], overwrite=overwrite, report=report)
            done_bytes += file.size
            report(file.size)
        _write_manifest(directory, manifest_bytes)
    except OSError as error:
        raise Unavailable(f"{directory} cannot be written: {error.strerror or error}.", code="disk") from error
    return Download(directory=directory, manifest=manifest, files=files)


def _merged(manifest: Manifest, job_id: str) -> Manifest:
    """The manifest of the merged model in an adapter's checkpoint. Raises `NotFound` if there is none."""
    prefix = f"{MERGED_NAME}/"
    if manifest.format != "adapter":
        raise NotFound(f"{manifest.name} of {job_id} is already a complete model; download it without --merged.")
    files = [
        file.model_copy(update={"path": file.path.removeprefix(prefix)})
        for file in manifest.files
        if file.path.startswith(prefix)
    ]
    if not files:
        raise NotFound(
            f"{manifest.name} of {job_id} has no merged model: only final and best have one, and only with "
            f"lora.save_merged. Create one with `zeta rerun {job_id} --from latest --set lora.save_merged=true`, or "
            "merge the adapter into its base model yourself, as the README.md of the checkpoint shows."
        )
    is_module = all(file.path != "config.json" for file in files)
    return manifest.model_copy(update={"files": files, "format": "module" if is_module else "huggingface"})


def _is_selected(file: ManifestFile, include: tuple[str, ...], state: bool) -> bool:
    is_state = file.role == "state" or file.path.split("/")[0] == TRAINING_STATE_NAME
    if is_state and not state:
        return False
    return not include or any(fnmatchcase(file.path, pattern) for pattern in include)


def _local_path(directory: Path, path: str) -> Path:
    """The local path of a manifest's path. Raises `InvalidRequest` if it, or a link along it, leaves the folder."""
    root = directory.resolve()
    target = (root / path).resolve()
    if "\0" in path or ":" in path or not target.is_relative_to(root) or target == root:
        raise InvalidRequest(f"The manifest contains the path {path!r}, which is outside {directory}.")
    return target


def _require_free_space(directory: Path, files: tuple[ManifestFile, ...], targets: dict[str, Path]) -> None:
    missing = sum(file.size - _size(part_path(targets[file.path])) for file in files if not targets[file.path].exists())
    free = shutil.disk_usage(directory).free
    if missing > free:
        raise Unavailable(
            f"{directory} has {free:,} bytes free, but the download needs {missing:,}; free some space.", code="disk"
        )


def _require_same(target: Path, content: bytes) -> None:
    """Raise `Conflict` if the folder contains a different manifest."""
    if target.exists() and target.read_bytes() != content:
        raise _file_exists(target)


def _file_exists(target: Path) -> Conflict:
    return Conflict(
        f"{target} already exists with different content; choose another folder, or overwrite it with --force.",
        code="file_exists",
    )


def _fetch_verified(
    transport: HttpTransport,
    url: str,
    file: ManifestFile,
    target: Path,
    *,
    overwrite: bool,
    report: Callable[[int], None],
) -> None:
    if target.exists():
        if _size(target) == file.size and _digest(target).hexdigest() == file.sha256:
            return
        if not overwrite:
            raise _file_exists(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(target)
    for _ in range(MAX_ATTEMPTS):
        digest = _fetch(transport, url + quote(file.path), file, part, report)
        if digest == file.sha256:
            flush(part)
            rename_durably(part, target)
            return
        part.unlink()
    raise Corrupt(
        f"{file.path} does not match its SHA-256 {file.sha256} after {MAX_ATTEMPTS} downloads; "
        "the stored checkpoint is damaged, so use another one."
    )


def _fetch(transport: HttpTransport, url: str, file: ManifestFile, part: Path, report: Callable[[int], None]) -> str:
    """Complete ``part`` and return its SHA-256. After a lost connection, continue from the last byte received."""
    backoff = transport.backoff()
    while True:
        digest: _Digest = _digest(part)
        received = _size(part)
        if received == file.size and part.exists():
            return digest.hexdigest()
        if received > file.size:
            part.unlink()
            continue
        headers = {"Accept-Encoding": "identity"}
        if received:
            headers |= {"Range": f"bytes={received}-", "If-Range": f'"{file.sha256}"'}
        try:
            with transport.download(url, headers=headers) as response:
                is_continued = response.status_code == 206
                if not is_continued:
                    received, digest = 0, hashlib.sha256()
                with part.open("ab" if is_continued else "wb") as stream:
                    for chunk in response.iter_bytes(CHUNK_BYTES):  # decoded: a gateway may compress
                        backoff.restart()
                        received += len(chunk)
                        if received > file.size:
                            break
                        stream.write(chunk)
                        digest.update(chunk)
                        report(received)
        except httpx.TransportError as error:
            if not backoff.wait():
                raise transport.unreachable(error) from error
            continue
        except Unavailable:
            if not backoff.wait():
                raise
            continue
        if received >= file.size:
            return digest.hexdigest() if received == file.size else ""
        if not backoff.wait():  # the body ended early without an error
            raise transport.unreachable(EOFError(f"{url} ended after {received} of {file.size} bytes"))


def _write_manifest(directory: Path, manifest_bytes: bytes) -> None:
    write_durably(directory / MANIFEST_NAME, manifest_bytes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _digest(path: Path) -> _Digest:
    digest = hashlib.sha256()
    if path.exists():
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest
