"""Distinguishes plain data from values that a library would treat as a path, a URL or a Hub repository."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, cast

from zeta_core.contract.model_json.faults import JsonLocation

CODE_IS_NEVER_RUN = "code in a model is never run here; remove it"  # the fix for a key that refers to code
MAX_TEXT = 1000  # characters of a plain value
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|[/\\])|file:", re.IGNORECASE)  # a URL, or a Windows drive
_PATH_KEY = re.compile(r"(^|_)(files?|paths?|dirs?|directory|folders?|filenames?|repos?|repo_id|name_or_path)$")
# The values of these keys name classes, modules, kernels or repositories with code, which is never loaded.
CODE_KEYS = frozenset(
    {"auto_map", "_auto_class", "auto_mapping", "custom_pipelines", "custom_generate", "code_revision", "init_inputs"}
    | {"trust_remote_code", "kernel_config", "use_kernels", "allow_all_kernels", "megatron_config"}
)
FILE_KEYS = frozenset(
    {"transformers_weights", "subfolder", "cache_dir", "tokenizer_object", "backbone", "vocab", "merges"}
    | {"source_spm", "target_spm", "entity_vocab", "pretrained", "tokenizer"}
)
# Keys whose values are arbitrary text: OPT's prefix is "</s>".
TEXT_KEYS = frozenset({"prefix", "suffix", "stop_strings", "id2label", "label2id"})
# Records of the origin of the files, which no library reads. They are omitted.
RECORD_KEYS = frozenset(
    {"_name_or_path", "name_or_path", "_model_name_or_path", "special_tokens_map_file", "_commit_hash"}
)


def leads_outside(text: str) -> bool:
    """Whether a text is an absolute path, a URL, or a path that leaves its folder."""
    parts = text.replace("\\", "/").split("/")
    return text.startswith(("/", "\\", "~")) or ".." in parts or "\0" in text or _SCHEME.match(text) is not None


def looks_like_a_path(text: str) -> bool:
    """Whether a library could interpret a text as a path or a repository, because it contains a separator.

    A token such as ``</s>`` does not look like a path.
    """
    if text.startswith("<") and text.endswith(">"):
        return ".." in text
    return leads_outside(text) or "/" in text or "\\" in text


def names_a_file(key: str) -> bool:
    """Whether the value of a key names a file, a folder or a repository."""
    return key not in RECORD_KEYS and (key in FILE_KEYS or _PATH_KEY.search(key) is not None)


def check_file_key(location: JsonLocation, key: str, value: object) -> None:
    """Reject a name unless it is that of another file in the same folder."""
    for name in cast("list[object]", value) if isinstance(value, list) else [value]:
        if name is None or name == "" or isinstance(name, (bool, int, float)):  # no file, or a rate such as drop_path
            continue
        if isinstance(name, str) and location.origin == "external" and not leads_outside(name):
            continue
        if not isinstance(name, str) or PurePosixPath(name).name != name or name not in location.siblings:
            location.reject(key, value, "it must name a file in the same folder of the model, or be removed")


def check_code_key(location: JsonLocation, key: str, value: object) -> None:
    """Reject a key that refers to code, unless it is empty. In a published model, record it as ignored instead."""
    if not value:
        return
    texts = list(_texts(value))
    if location.origin == "external" and not any(leads_outside(text) for text in texts):
        location.ignore(key)
        return
    location.reject(key, value, CODE_IS_NEVER_RUN)


def check_plain(location: JsonLocation, key: str, value: object) -> None:
    """Reject a value that is not plain data, or that contains such a value."""
    if isinstance(value, str):
        if location.origin == "external" and not leads_outside(value):
            return
        if len(value) > MAX_TEXT or looks_like_a_path(value):
            location.reject(key, value, "it looks like a path or a repository, but must be a plain value; remove it")
    elif isinstance(value, dict):
        for name, inner in cast("dict[str, object]", value).items():
            check_value(location.inside(key), name, inner)
    elif isinstance(value, list):
        for inner in cast("list[object]", value):
            check_plain(location, key, inner)


def is_text(key: str, value: object) -> bool:
    """Whether a value is text for people or for the model, which no library interprets as a name."""
    texts = cast("list[object]", value) if isinstance(value, list) else [value]
    if isinstance(value, dict):
        texts = list(cast("dict[str, object]", value).values())
    return key in TEXT_KEYS and all(is_scalar(text) for text in texts)


def is_left_out(location: JsonLocation, key: str, value: object) -> bool:
    """Whether a value is omitted from the file that libraries see, although it was not rejected."""
    if key in CODE_KEYS or key in RECORD_KEYS:
        return True
    if is_text(key, value):
        return False
    texts = _texts(value)
    if names_a_file(key):
        return not set(texts) <= set(location.siblings)
    return any(looks_like_a_path(text) for text in texts)


def check_value(location: JsonLocation, key: str, value: object) -> None:
    """Check a value by the kind of its key: code, a file name, or plain data."""
    if key in RECORD_KEYS or is_text(key, value):
        return
    if key in CODE_KEYS:
        check_code_key(location, key, value)
    elif names_a_file(key):
        check_file_key(location, key, value)
    else:
        check_plain(location, key, value)


def is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for inner in cast("dict[str, Any]", value).values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in cast("list[Any]", value) for text in _texts(inner)]
    return []
