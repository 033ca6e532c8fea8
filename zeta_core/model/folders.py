"""Creating model folders that are safe for libraries to load: checked copies of uploaded, stored or downloaded files.

Guarantees: a folder contains only files that `system.model_files` allows, with rewritten JSON files and unpacked or
linked weights. It appears under its final name only when it is complete. For the same content, only one process creates
it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from zeta_core.contract.data_files.signatures import FIRST_BYTES, is_lfs_pointer
from zeta_core.contract.wire.run_directory import file_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.system.durable_files import part_path
from zeta_core.system.model_files import (
    ArchiveFiles,
    FolderFiles,
    InvalidModelFiles,
    ModelFiles,
    Origin,
    clean_files,
    ignored_code,
    model_folder,
)

# The files that are fetched from the Hub: no pickles and no code. The weights are fetched only if they are needed.
_FETCHED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_FETCHED_WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True)
class IgnoredCode:
    """References to code in a model's files, which are ignored: by file, the keys."""

    model: str
    keys: Mapping[str, list[str]]

    @property
    def message(self) -> str:
        keys = ", ".join(f"{key} in {file}" for file, names in self.keys.items() for key in names)
        return (
            f"{self.model} refers to code of its own ({keys}). Code of a model is never run: the classes of the "
            "installed libraries are used instead."
        )


OnIgnored = Callable[[IgnoredCode], None]


def ignore_code(_: IgnoredCode) -> None:
    """An `OnIgnored` that reports nothing."""


def upload_copy(file_id: str, locations: SourceLocations, cache: Path) -> Path:
    """The folder of an uploaded .tar. Raises `InvalidModel` with the rejected file and the reason."""
    stored = None if locations.artifacts_root is None else locations.artifacts_root / file_key(file_id)
    if stored is None or not stored.is_file():
        raise InvalidModel(f"model names {file_id}, which does not exist in this service; upload the file again.")
    filename = locations.files[file_id].filename if file_id in locations.files else file_id
    target = cache / f"{_kind(locations)}-{file_id}"
    try:
        if not target.is_dir():
            files = ArchiveFiles(stored, filename)
            _write_copy(files, model_folder(files), target, "upload", locations)
    except InvalidModelFiles as error:
        raise InvalidModel(error.message) from error
    os.utime(target)  # mark it as used, because the worker's cache evicts the least recently used entries
    return target


def folder_copy(
    directory: Path,
    name: str,
    locations: SourceLocations,
    cache: Path,
    on_ignored: OnIgnored,
    *,
    roots: tuple[Path, ...] = (),
) -> Path:
    """A copy of an untrusted folder, with links to its weights, which may be located below ``roots``.

    ``on_ignored`` is called if the folder refers to code. If the folder contains no Hugging Face model, the folder
    itself is returned, and loading it raises the error.
    """
    if not any(
        any(directory.glob(pattern)) for pattern in ("config.json", "adapter_config.json", "*.gguf", "tokenizer*")
    ):
        return directory
    try:
        files = FolderFiles(directory, name, roots=roots)
        target = cache / f"{_kind(locations)}-{_fingerprint(directory, files)}"
        if not target.is_dir():
            _write_copy(files, ".", target, "external", locations)
        _report_ignored(files, on_ignored)
    except InvalidModelFiles as error:
        raise InvalidModel(error.message) from error
    os.utime(target)
    return target


def report_ignored_code(directory: Path, name: str, on_ignored: OnIgnored) -> None:
    """Call ``on_ignored`` if a trusted folder, which is loaded unchanged, refers to code."""
    with suppress(InvalidModelFiles, OSError):  # the libraries report files that can't be read
        _report_ignored(FolderFiles(directory, name, roots=(Path(directory.resolve().anchor),)), on_ignored)


def _report_ignored(files: FolderFiles, on_ignored: OnIgnored) -> None:
    keys = ignored_code(files)
    if keys:
        on_ignored(IgnoredCode(files.name, keys))


def hub_copy(
    name: str, locations: SourceLocations, cache: Path, on_ignored: OnIgnored, *, what: str
) -> tuple[Path, str]:
    """A copy of the local snapshot of a Hub repository ``org/name[@revision]``, and its commit."""
    repository, _, revision = name.partition("@")
    if not locations.allow_hub:
        raise InvalidModel(f"{what} is {name!r}, but ZETA_HUB is off here; upload it as a file, or set ZETA_HUB=on.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*_FETCHED, *(_FETCHED_WEIGHTS if locations.fetch_weights else ())]
    try:
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except HFValidationError as error:
        raise InvalidModel(f"{what} is {name!r}, which is neither a local directory nor a Hub id org/name.") from error
    except Exception as error:
        here = "is not a local directory, and " if locations.any_path else ""
        raise InvalidModel(f"{what} {name!r} {here}cannot be fetched from the Hub: {_hub_fault(error)}") from error
    # A snapshot consists of links to the repository's blobs in a sibling folder.
    return folder_copy(path, name, locations, cache, on_ignored, roots=(path.parent.parent / "blobs",)), path.name


def _hub_fault(error: Exception) -> str:
    """Why the Hub did not provide a repository, and what the user can do."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    first = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
    if isinstance(error, GatedRepoError):
        return f"access to it must be requested on its page, and HF_TOKEN must be set to a token of that user ({first})"
    if isinstance(error, RepositoryNotFoundError):
        return f"it does not exist, or it is private and HF_TOKEN is not set to a token with access ({first:.200})"
    if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, HfHubHTTPError):
        return (
            f"the Hub cannot be reached, and the files are not in the local cache ({first:.200}); check the network "
            "connection, HF_ENDPOINT and HF_HUB_OFFLINE, or use a local copy of the model"
        )
    return f"{first:.300}"


def _write_copy(files: ModelFiles, folder: str, target: Path, origin: Origin, locations: SourceLocations) -> None:
    """Write the checked files to ``target``, unless it exists. Raises `InvalidModelFiles`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return
        part = part_path(target)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for path, content in clean_files(files, folder, origin, weights=locations.fetch_weights):
            copied = part / path
            copied.parent.mkdir(parents=True, exist_ok=True)
            source = (PurePosixPath(folder) / path).as_posix()
            if content is not None:
                copied.write_bytes(content)
            elif isinstance(files, FolderFiles):
                copied.symlink_to(files.source(source))
            else:
                with files.open(source) as stream, copied.open("xb") as copy:
                    shutil.copyfileobj(stream, copy, 1 << 20)
        part.rename(target)


def _kind(locations: SourceLocations) -> str:
    # Earlier versions used other names for unchecked folders.
    return "checked-model" if locations.fetch_weights else "checked-config"


def _fingerprint(directory: Path, files: FolderFiles) -> str:
    """A hash that changes with the files of a folder."""
    seen = [str(directory.resolve())]
    for name, size in files.sizes.items():
        seen.append(f"{name} {size} {files.source(name).stat().st_mtime_ns} {files.source(name)}")
    return hashlib.sha256("\n".join(seen).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def lfs_pointer_fault(directory: Path) -> str | None:
    """The fault of a folder with a Git LFS pointer instead of a file; libraries would report a damaged file."""
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.stat().st_size < FIRST_BYTES and is_lfs_pointer(file.read_bytes()):
            return (
                f"cannot be loaded, because {file.name} is a Git LFS pointer and not the file itself; download the "
                "files with `git lfs pull`."
            )
    return None
