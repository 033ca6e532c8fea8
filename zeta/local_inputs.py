"""Uploading the local paths of a spec and replacing them with file ids. Other values stay unchanged.

``dataset`` and ``eval_dataset`` may be a string or contain strings in a list: an existing file or folder is uploaded,
``file_...`` is an uploaded file, ``hub:org/name`` is a dataset on the Hub, ``path:corpus/*.txt`` is a path on the
workers, and ``python-docs`` is the documentation text that ships with Python. ``{"file": "./local.jsonl", ...}`` is
uploaded too. ``model`` may be an existing folder (packed as a .tar), a .tar file, a ``config.json`` (a model trained
from scratch), ``job_...`` or ``job_.../step-N``; any other string is a Hub id.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from zeta.local_files import exists, expanded, shown_path, template_text
from zeta_core.contract.data_files.file_types import file_suffixes, listed
from zeta_core.contract.errors import InvalidRequest, Unavailable
from zeta_core.contract.identifiers import is_hub_dataset, is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.job.responses import FilePurpose, StoredFile
from zeta_core.contract.printable import printable
from zeta_core.contract.strict_json import JsonFault, read_json
from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME
from zeta_core.system.data_folder import Split, find_data_files

SHOWN_UPLOADS = 10  # files of a folder that are reported individually with their ids
DATA_FIELDS: dict[str, Split] = {"dataset": "train", "eval_dataset": "held_out"}
BUILTIN_NAMES = ("python-docs",)
MODEL_FILES = ("config.json", "*.gguf")

Upload = Callable[[Path, FilePurpose], StoredFile]
Report = Callable[[str], None]


def upload_local(spec: dict[str, Any], upload: Upload, report: Report) -> dict[str, Any]:
    """The spec with every local path uploaded. ``report`` is called with a message for each upload.

    Raises `InvalidRequest` for a missing path.
    """
    changed = dict(spec)
    pretokenized = spec.get("use_pretokenized") is True
    for name, split in DATA_FIELDS.items():
        data = _DataUploader(name, split, pretokenized, upload, report)
        value = changed.get(name)
        if isinstance(value, list):
            changed[name] = [data.source(item) for item in cast("list[Any]", value)]
        elif value is not None:
            changed[name] = data.source(value)
    if "model" in changed:
        changed["model"] = _model(changed["model"], upload, report)
    if "chat_template" in changed:
        changed["chat_template"] = template_text(changed["chat_template"])
    return changed


@dataclass(frozen=True)
class _DataUploader:
    """Uploads the local files of one data field."""

    name: str
    split: Split
    pretokenized: bool
    upload: Upload
    report: Report

    def source(self, value: Any) -> Any:
        if isinstance(value, str | os.PathLike):
            return self._text_source(os.fspath(cast("str | os.PathLike[str]", value)))
        if isinstance(value, dict) and "file" in value:
            source = cast("dict[str, Any]", value)
            files: Any = source["file"]
            if isinstance(files, str | os.PathLike | list):
                items = cast("list[Any]", files if isinstance(files, list) else [files])
                ids = [file_id for item in items for file_id in self._file_ids(item, source.get("format"))]
                return {**source, "file": ids if isinstance(files, list) or len(ids) > 1 else ids[0]}
        return value

    def _text_source(self, text: str) -> Any:
        kind, separator, rest = text.partition(":")
        if kind == "hub" and separator and not is_hub_dataset(rest):
            raise InvalidRequest(
                f"{self.name} is {text!r}; write a dataset on the Hub as hub:owner/name, a local file as its path, and "
                "a path on the workers as path:PATH.",
                param=self.name,
                code="invalid_value",
            )
        if separator and kind in ("hub", "path") and rest:
            return {kind: rest}
        if is_id(text, "file"):
            return {"file": text}
        if exists(expanded(text)):
            ids = self._upload(text, None)
            return {"file": ids[0] if len(ids) == 1 else ids}
        if text in BUILTIN_NAMES:
            return {"builtin": text}
        hub = f"hub:{text} for a dataset on the Hub, " if is_hub_dataset(text) else ""
        raise InvalidRequest(
            f"{self.name} is {text!r}, but there is no such file or folder here; write {hub}path:{text} for a path on "
            f"the workers, or use the built-in {', '.join(BUILTIN_NAMES)}.",
            param=self.name,
            code="no_such_file",
        )

    def _file_ids(self, item: Any, data_format: Any) -> list[Any]:
        if isinstance(item, os.PathLike):
            item = os.fspath(cast("os.PathLike[str]", item))
        if not isinstance(item, str) or is_id(item, "file"):
            return [item]
        existing(item, f"{self.name}.file")
        return self._upload(item, data_format)

    def _upload(self, text: str, data_format: Any) -> list[str]:
        """Upload a file, or the data files of a folder in the order of their names, and return their ids."""
        path = expanded(text)
        files: Sequence[Path] = (path,)
        if path.is_dir():
            suffixes = file_suffixes(data_format, pretokenized=self.pretokenized)
            try:
                selection = find_data_files(path, suffixes, split=self.split)
            except OSError as error:
                raise InvalidRequest(
                    f"The folder {shown_path(path)} cannot be read: {error.strerror}.", code="unreadable_file"
                ) from error
            if not selection.used:
                raise InvalidRequest(
                    f"{self.name} is the folder {shown_path(path)}, which contains no data file "
                    f"({listed(suffixes)}). "
                    f"{selection.skipped_summary()}".rstrip(),
                    param=self.name,
                    code="no_such_file",
                )
            self.report(selection.summary(text))
            files = selection.used
        ids: list[str] = []
        for number, file in enumerate(files, 1):
            stored = self.upload(file, "dataset")
            ids.append(stored.id)
            if number <= SHOWN_UPLOADS or stored.filename != file.name:
                self.report(upload_message(file, stored))
        if len(files) > SHOWN_UPLOADS:
            num_more = len(files) - SHOWN_UPLOADS
            self.report(f"Uploaded {num_more:,} more {'file' if num_more == 1 else 'files'}.")
        return ids


def source_object(text: str) -> dict[str, str]:
    """The object for a source that is written as a string, so that other fields can be added to it."""
    kind, separator, rest = text.partition(":")
    if separator and kind in ("hub", "path") and rest:
        return {kind: rest}
    is_builtin = text in BUILTIN_NAMES and not exists(Path(text))
    return {"builtin": text} if is_builtin else {"file": text}


def _model(value: Any, upload: Upload, report: Report) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, dict) and isinstance(value.get("file"), str) and not is_id(value["file"], "file"):
        return {**value, "file": _upload_and_report_model(existing(value["file"], "model.file"), upload, report)}
    if not isinstance(value, str):
        return value
    if is_id(value, "file"):
        return {"file": value}
    job, _, checkpoint = value.partition("/")
    if is_id(job, "job") and (not checkpoint or NAME_PATTERN.match(checkpoint)):
        return {"job": job, "checkpoint": checkpoint} if checkpoint else {"job": job}
    path = expanded(value)
    if exists(path) and path.is_file() and path.suffix == ".json":
        return {"config": model_config(path)}
    if exists(path):
        return {"file": _upload_and_report_model(path, upload, report)}
    if value.startswith((".", "/", "~")):
        existing(value, "model")
    return value


def model_config(path: Path) -> dict[str, Any]:
    """Read a model's config.json. Raises `InvalidRequest` if the file is not one."""
    try:
        config = read_json(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(
            f"model: {shown_path(path)} cannot be read: {error.strerror}.", param="model", code="unreadable_file"
        ) from error
    except JsonFault as fault:
        raise InvalidRequest(f"model: {fault.sentence(shown_path(path))}", param="model") from fault
    if not isinstance(config, dict) or "model_type" not in config:
        raise InvalidRequest(
            f"model is {str(path)!r}, which has no model_type; give a Hugging Face config.json.", param="model"
        )
    return config


def _upload_and_report_model(path: Path, upload: Upload, report: Report) -> str:
    """Upload a model, report it with ``report``, and return its file id."""
    stored = upload_model(path, upload)
    report(f"{shown_path(path)} is {stored.id} ({_bytes(stored)})")
    return stored.id


def looks_like_a_model(path: Path) -> bool:
    """Whether a path without a given purpose is a model: a folder, an archive or a GGUF file."""
    return path.is_dir() or path.suffix in (".tar", ".gguf")


def upload_model(path: Path, upload: Upload) -> StoredFile:
    """Upload a .tar, or pack a Hugging Face folder or GGUF file as one. Raises `InvalidRequest` for other files."""
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        with tempfile.TemporaryDirectory(prefix="zeta-model-") as folder:
            packed = Path(folder) / f"{path.resolve().name.removesuffix('.gguf')}.tar"
            try:
                pack_model(path, packed)
            except OSError as error:
                raise Unavailable(
                    f"{shown_path(path)} cannot be packed in {tempfile.gettempdir()}: {error.strerror}; free some "
                    "space there, or set TMPDIR to another folder.",
                    code="disk",
                ) from error
            return upload(packed, "model")
    if path.exists() and not tarfile.is_tarfile(path):
        raise InvalidRequest(
            f"model is {str(path)!r}, which is not a .tar archive; name a Hugging Face folder, a .tar of one, or a "
            ".gguf file.",
            param="model",
        )
    return upload(path, "model")


def pack_model(folder: Path, target: Path) -> None:
    """Pack a Hugging Face folder, or a single GGUF file, as a reproducible .tar.

    The bytes depend only on the names and contents of the files. Links are followed, because the Hub's cache consists
    of links. Hidden files and ``training_state/`` are excluded. Raises `InvalidRequest` if the folder contains neither
    ``config.json`` nor a GGUF file.
    """
    if folder.is_dir() and not any(any(folder.glob(name)) for name in MODEL_FILES):
        raise InvalidRequest(
            f"model is {str(folder)!r}, a folder without config.json; name a folder written by `save_pretrained`.",
            param="model",
            code="invalid_model",
        )
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in _model_files(folder) if folder.is_dir() else (folder,):
            with file.open("rb") as stream:
                entry = tarfile.TarInfo(file.name if file == folder else file.relative_to(folder).as_posix())
                entry.size = file.stat().st_size
                entry.mode = 0o644
                archive.addfile(entry, stream)


def _model_files(folder: Path) -> Iterable[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and parts[0] != TRAINING_STATE_NAME and not any(part.startswith(".") for part in parts):
            yield file


def upload_message(path: Path, stored: StoredFile) -> str:
    """A message that reports an upload, with the stored name if it differs."""
    name = "" if stored.filename == path.name else f", stored as {printable(stored.filename)}"
    return f"{shown_path(path)} is {stored.id} ({_bytes(stored)}{name})"


def _bytes(stored: StoredFile) -> str:
    return "1 byte" if stored.bytes == 1 else f"{stored.bytes:,} bytes"


def existing(text: str, name: str) -> Path:
    """The path of an existing file or folder. Raises `InvalidRequest` naming the field ``name``."""
    path = expanded(text)
    if not exists(path):
        raise InvalidRequest(
            f"{name} is {text!r}, but there is no such file or folder here.", param=name, code="no_such_file"
        )
    return path
