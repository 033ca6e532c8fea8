"""Local paths in a spec, uploaded and named by their file ids; everything else is left as it is.

``dataset`` (and ``eval_dataset``) may be, or hold in a list, a text: an existing file or folder is uploaded,
``file_...`` is an uploaded file, ``hub:org/name`` a dataset of the Hub, ``path:corpus/*.txt`` a path on the workers,
``python-docs`` the text that every Python brings. ``{"file": "./local.jsonl", ...}`` is uploaded too. ``model`` may be
an existing folder (packed as a .tar), a .tar file or a ``config.json`` (a model from scratch), ``job_...`` or
``job_.../step-N``; any other text is a Hub id.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zeta_core.contract.answers import FilePurpose, StoredFile
from zeta_core.contract.checkpoint import NAME_PATTERN
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.formats import DATA_SUFFIXES
from zeta_core.contract.identifiers import is_id
from zeta_core.contract.layout import TRAINING_STATE_NAME

BUILTIN_NAMES = ("python-docs",)
MODEL_SIGNS = ("config.json", "*.gguf")

Upload = Callable[[Path, FilePurpose], StoredFile]
Say = Callable[[str], None]


def upload_local(spec: dict[str, Any], upload: Upload, say: Say) -> dict[str, Any]:
    """The spec with every local path uploaded; ``say`` is told each one. Raises `InvalidRequest` for a missing path."""
    changed = dict(spec)
    for name in ("dataset", "eval_dataset"):
        value = changed.get(name)
        if isinstance(value, list):
            changed[name] = [_source(item, upload, say, name) for item in value]
        elif value is not None:
            changed[name] = _source(value, upload, say, name)
    if "model" in changed:
        changed["model"] = _model(changed["model"], upload, say)
    return changed


def _source(value: Any, upload: Upload, say: Say, name: str) -> Any:
    if isinstance(value, str):
        return _text_source(value, upload, say, name)
    if isinstance(value, dict) and "file" in value:
        files = value["file"]
        if isinstance(files, str) and not is_id(files, "file"):
            ids = _upload_data(_existing(files, f"{name}.file"), upload, say)
            return {**value, "file": ids[0] if len(ids) == 1 else ids}
        if isinstance(files, list):
            return {**value, "file": [_file_id(item, upload, say, f"{name}.file") for item in files]}
    return value


def _text_source(text: str, upload: Upload, say: Say, name: str) -> Any:
    kind, separator, rest = text.partition(":")
    if separator and kind in ("hub", "path") and rest:
        return {kind: rest}
    if is_id(text, "file"):
        return {"file": text}
    path = Path(text).expanduser()
    if path.exists():
        ids = _upload_data(path, upload, say)
        return {"file": ids[0] if len(ids) == 1 else ids}
    if text in BUILTIN_NAMES:
        return {"builtin": text}
    raise InvalidRequest(
        f"{name} is {text!r}, and no such file or folder is here; write hub:{text} for a dataset of the Hub, "
        f"path:{text} for a path on the workers, or one of {', '.join(BUILTIN_NAMES)}.",
        param=name,
        code="no_such_file",
    )


def _file_id(item: Any, upload: Upload, say: Say, name: str) -> Any:
    if not isinstance(item, str) or is_id(item, "file"):
        return item
    ids = _upload_data(_existing(item, name), upload, say)
    if len(ids) != 1:
        raise InvalidRequest(f"{name} is {item!r}, which is a folder; name its files.", param=name)
    return ids[0]


def _upload_data(path: Path, upload: Upload, say: Say) -> list[str]:
    """A file, or the data files of a folder in the order of their names."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in DATA_SUFFIXES)
        if not files:
            raise InvalidRequest(
                f"The folder {path} holds no data file ({', '.join(DATA_SUFFIXES)}); name one that does.",
                code="no_such_file",
            )
    stored = [upload(file, "dataset") for file in files]
    for file, answer in zip(files, stored, strict=True):
        say(f"{file} is {answer.id} ({answer.bytes:,} bytes)")
    return [answer.id for answer in stored]


def _model(value: Any, upload: Upload, say: Say) -> Any:
    if isinstance(value, dict) and isinstance(value.get("file"), str) and not is_id(value["file"], "file"):
        return {**value, "file": _told(_existing(value["file"], "model.file"), upload, say)}
    if not isinstance(value, str):
        return value
    if is_id(value, "file"):
        return {"file": value}
    job, _, checkpoint = value.partition("/")
    if is_id(job, "job") and (not checkpoint or NAME_PATTERN.match(checkpoint)):
        return {"job": job, "checkpoint": checkpoint} if checkpoint else {"job": job}
    path = Path(value).expanduser()
    if path.is_file() and path.suffix == ".json":
        return {"config": _config(path)}
    if path.exists():
        return {"file": _told(path, upload, say)}
    if value.startswith((".", "/", "~")):
        _existing(value, "model")
    return value


def _config(path: Path) -> dict[str, Any]:
    """A model's config out of its own file. Raises `InvalidRequest` where it is none."""
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidRequest(f"model is {str(path)!r}, which is not JSON: {error}.", param="model") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InvalidRequest(
            f"model is {str(path)!r}, which names no model_type; give a Hugging Face config.json.", param="model"
        )
    return config


def _told(path: Path, upload: Upload, say: Say) -> str:
    stored = upload_model(path, upload)
    say(f"{path} is {stored.id} ({stored.bytes:,} bytes)")
    return stored.id


def looks_like_a_model(path: Path) -> bool:
    """Whether it is sent as a model where nobody says what it is: by its name, and data is no folder or archive."""
    return path.is_dir() or path.suffix in (".tar", ".gguf")


def upload_model(path: Path, upload: Upload) -> StoredFile:
    """A .tar as it is, or a Hugging Face folder or GGUF file packed as one. Raises `InvalidRequest` for others."""
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        with tempfile.TemporaryDirectory(prefix="zeta-model-") as folder:
            packed = Path(folder) / f"{path.resolve().name.removesuffix('.gguf')}.tar"
            pack_model(path, packed)
            return upload(packed, "model")
    if path.exists() and not tarfile.is_tarfile(path):
        raise InvalidRequest(
            f"model is {str(path)!r}, which is no .tar; name a Hugging Face folder, a .tar of one, or a .gguf file.",
            param="model",
        )
    return upload(path, "model")


def pack_model(folder: Path, target: Path) -> None:
    """A Hugging Face folder as a .tar whose bytes depend on the files' names and contents alone.

    Links are followed (the Hub's cache is made of them); hidden files and ``training_state/`` stay out. Raises
    `InvalidRequest` where the folder is no model (``config.json`` or a GGUF file). A GGUF file is packed by itself.
    """
    if folder.is_dir() and not any(any(folder.glob(name)) for name in MODEL_SIGNS):
        raise InvalidRequest(
            f"model is {str(folder)!r}, a folder without config.json; name a folder that `save_pretrained` wrote.",
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


def _existing(text: str, name: str) -> Path:
    path = Path(text).expanduser()
    if not path.exists():
        raise InvalidRequest(
            f"{name} is {text!r}, and no such file or folder is here.", param=name, code="no_such_file"
        )
    return path
