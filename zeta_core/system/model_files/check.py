"""Selects and sanitizes the files of a model that libraries may open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from zeta_core.contract.data_files.signatures import FIRST_BYTES, is_lfs_pointer
from zeta_core.contract.model_json.adapter import clean_adapter
from zeta_core.contract.model_json.config import clean_config
from zeta_core.contract.model_json.faults import InvalidModelFiles, JsonLocation, Origin
from zeta_core.contract.model_json.json_files import MAX_BYTES, parse_any, parse_object
from zeta_core.contract.model_json.tokenizer import (
    check_tokenizer,
    clean_ids,
    clean_special_tokens,
    clean_tokenizer_config,
)
from zeta_core.contract.model_json.values import (
    CODE_KEYS,
    check_code_key,
    check_file_key,
    leads_outside,
    looks_like_a_path,
    names_a_file,
)
from zeta_core.system.model_files.files import ArchiveFiles, ModelFiles
from zeta_core.system.model_files.gguf import check_gguf_header
from zeta_core.system.model_files.safetensors import check_header

INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".gguf")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
ADAPTER_CONFIG, ADAPTER_WEIGHTS, MERGED = "adapter_config.json", "adapter_model.safetensors", "merged"
_TEMPLATES = "additional_chat_templates"
_DATA = (".txt", ".model", ".tiktoken", ".jinja")  # vocabularies and templates, which name no files
_DATA_JSON = ("vocab.json", "tekken.json", "emoji.json", "normalizer.json", "entity_vocab.json")  # tokens and ids
# Records of a run: no library reads them, and they may reveal its paths.
_RECORDS = ("trainer_state.json", "manifest.json", "all_results.json", "train_results.json", "eval_results.json")
_CLEANERS: dict[str, Callable[[dict[str, Any], JsonLocation], dict[str, Any]]] = {
    "config.json": clean_config,
    "generation_config.json": clean_config,
    "tokenizer_config.json": clean_tokenizer_config,
    "special_tokens_map.json": clean_special_tokens,
    "added_tokens.json": clean_ids,
    ADAPTER_CONFIG: clean_adapter,
}


def check_archive(path: Path, filename: str) -> None:
    """Raise `InvalidModelFiles` for an uploaded .tar without a model, or with content that a model must not have."""
    files = ArchiveFiles(path, filename)
    for name in files.sizes:
        if _is_hidden(name):
            continue
        reject_lfs_pointer(files, name)
        suffix = PurePosixPath(name).suffix.lower()
        if suffix == ".json":
            cleaned_json(files, name, "upload")
        elif suffix in WEIGHTS:
            check_weights(files, name)
    names = [PurePosixPath(name) for name in files.sizes if not _is_hidden(name)]
    pickled = [name for name in names if name.suffix.lower() in _PICKLED]
    if pickled and not any(name.suffix.lower() in WEIGHTS for name in names):
        raise InvalidModelFiles(
            f"{filename}: {pickled[0]} is not safetensors, and pickled weights are never read; save the model with "
            "save_pretrained (safetensors), and upload it again."
        )
    model_folder(files)


def model_folder(files: ModelFiles) -> str:
    """The folder of the model in an archive: the one with a config, an adapter, a GGUF file or a tokenizer.

    Raises `InvalidModelFiles` if there is none.
    """
    for pattern in ("config.json", ADAPTER_CONFIG, "*.gguf", "tokenizer_config.json"):
        found = [
            PurePosixPath(name) for name in files.sizes if PurePosixPath(name).match(pattern) and not _is_hidden(name)
        ]
        if found:
            return min(found, key=lambda path: (len(path.parts), str(path))).parent.as_posix()
    raise InvalidModelFiles(f"{files.name} contains no config.json; tar the directory of a Hugging Face model.")


def clean_files(files: ModelFiles, folder: str, origin: Origin, *, weights: bool) -> Iterator[tuple[str, bytes | None]]:
    """The paths of the files in ``folder`` that libraries may open, and the new content of those that are rewritten.

    Raises `InvalidModelFiles`. Without ``weights``, the weights and their index are omitted.
    """
    root = PurePosixPath(folder)
    for name in files.sizes:
        path = PurePosixPath(name)
        if not path.is_relative_to(root) or _is_hidden(name):
            continue
        inside = path.relative_to(root)
        merged = inside.parts[0] == MERGED
        parts = inside.parts[1:] if merged else inside.parts
        if not parts or not (
            len(parts) == 1 or (len(parts) == 2 and parts[0] == _TEMPLATES and path.suffix == ".jinja")
        ):
            continue
        if _is_adapter_beside_model(path, files):
            continue
        reject_lfs_pointer(files, name)
        if path.suffix == ".json" and path.name != INDEX:
            content = cleaned_json(files, name, origin)
            if content is not None or path.name in (*_DATA_JSON, "tokenizer.json"):
                yield inside.as_posix(), content
        elif path.suffix in _DATA:
            yield inside.as_posix(), None
        elif weights and path.name == INDEX:
            yield inside.as_posix(), cleaned_json(files, name, origin)
        elif weights and path.suffix in WEIGHTS:
            check_weights(files, name)
            yield inside.as_posix(), None


def ignored_code(files: ModelFiles) -> dict[str, list[str]]:
    """The keys that `clean_files` leaves out of a published model because they refer to code, by file.

    Raises `InvalidModelFiles`.
    """
    ignored: dict[str, list[str]] = {}
    for name in files.sizes:
        path = PurePosixPath(name)
        is_read = path.parent.as_posix() in (".", MERGED) and not _is_adapter_beside_model(path, files)
        if is_read and path.name in _CLEANERS:
            keys: list[str] = []
            cleaned_json(files, name, "external", ignored=keys)
            if keys:
                ignored[name] = keys
    return ignored


def cleaned_json(files: ModelFiles, name: str, origin: Origin, *, ignored: list[str] | None = None) -> bytes | None:
    """The rewritten content of a JSON file; ``None`` if libraries see the file itself, or do not see it.

    The keys that are omitted because they refer to code are appended to ``ignored``.
    """
    path = PurePosixPath(name)
    if path.name in _RECORDS:
        return None
    if files.sizes[name] > MAX_BYTES:
        raise InvalidModelFiles(
            f"{files.name}: {name} has {files.sizes[name]} bytes; a JSON file of a model has at most {MAX_BYTES}."
        )
    label = f"{files.name}: {name}"
    with files.open(name) as stream:
        content = stream.read()
    siblings = {other.name for other in map(PurePosixPath, files.sizes) if other.parent == path.parent}
    location = JsonLocation(label, siblings, origin, ignored=[] if ignored is None else ignored)
    # A user can't correct a published model, and libraries see only one of the values.
    lenient = origin == "external"
    if path.name == INDEX:
        index = parse_object(content, label, allow_duplicate_names=lenient)
        return json.dumps(_clean_index(index, location)).encode()
    if path.name == "tokenizer.json":
        check_tokenizer(parse_object(content, label), location)
    elif path.name in _CLEANERS:
        clean = _CLEANERS[path.name](parse_object(content, label, allow_duplicate_names=lenient), location)
        return json.dumps(clean, ensure_ascii=False, indent=1).encode()
    elif path.name in _DATA_JSON:
        parse_object(content, label)
    else:
        # Others may contain a list, such as the modules.json of an embedding model.
        unread = parse_any(content, label, allow_duplicate_names=lenient)
        _check_unread(cast("dict[str, Any]", unread) if isinstance(unread, dict) else {path.stem: unread}, location)
    return None


def reject_lfs_pointer(files: ModelFiles, name: str) -> None:
    """Raise `InvalidModelFiles` for a Git LFS pointer instead of a file."""
    if files.sizes[name] >= FIRST_BYTES:
        return
    with files.open(name) as stream:
        if is_lfs_pointer(stream.read()):
            raise InvalidModelFiles(
                f"{files.name}: {name} is a Git LFS pointer and not the file itself; download the files of the model "
                "with `git lfs pull`."
            )


def check_weights(files: ModelFiles, name: str) -> None:
    """Raise `InvalidModelFiles` for weights whose format does not match their name, such as a pickle."""
    with files.open(name) as stream:
        if PurePosixPath(name).suffix.lower() == ".gguf":
            check_gguf_header(stream, files.sizes[name], f"{files.name}: {name}")
        else:
            check_header(stream, files.sizes[name], f"{files.name}: {name}")


def _clean_index(index: dict[str, Any], location: JsonLocation) -> dict[str, Any]:
    """The index of sharded weights: the safetensors file of each tensor, in the same folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        location.reject("weight_map", weight_map, "it must be an object that maps tensors to files")
    for tensor, file in cast("dict[str, Any]", weight_map).items():
        is_beside = isinstance(file, str) and file in location.siblings and "/" not in file
        if not is_beside or not file.endswith(".safetensors"):
            location.inside("weight_map").reject(
                tensor, file, "it must name a .safetensors file in the same folder of the model"
            )
    stored = index.get("metadata")
    metadata = cast("dict[str, Any]", stored) if isinstance(stored, dict) else {}
    return {"metadata": {"total_size": metadata.get("total_size", 0)}, "weight_map": weight_map}


def _check_unread(content: Mapping[str, Any], location: JsonLocation) -> None:
    """Reject code and outside files in a JSON file that is never read, because its author expects it to be read."""
    for key, value in content.items():
        if key in CODE_KEYS:
            check_code_key(location, key, value)
        else:
            _check_unread_value(key, value, location)


def _check_unread_value(key: str, value: object, location: JsonLocation) -> None:
    """Check the value of a key, or one of the values in its list, however deeply lists are nested."""
    if isinstance(value, list):
        for item in cast("list[object]", value):
            _check_unread_value(key, item, location)
    elif isinstance(value, dict):
        _check_unread(cast("dict[str, Any]", value), location.inside(key))
    elif isinstance(value, str):
        if names_a_file(key) and looks_like_a_path(value):
            check_file_key(location, key, value)
        elif leads_outside(value) and not value.startswith(("http://", "https://")):
            location.reject(key, value, "it must not refer to anything outside the model; remove it")


def _is_adapter_beside_model(path: PurePosixPath, files: ModelFiles) -> bool:
    """Whether a file is the config of an adapter that transformers would load on top of the model beside it."""
    return path.name == ADAPTER_CONFIG and str(path.with_name("config.json")) in files.sizes


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
