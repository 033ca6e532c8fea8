"""Loading the tokenizer of a run: the one that the spec names, the model's own, or the byte-level one.

The rules for trusted and untrusted files are those of `zeta_core.model.sources`.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.folders import (
    OnIgnored,
    hub_copy,
    ignore_code,
    lfs_pointer_fault,
    report_ignored_code,
    upload_copy,
)
from zeta_core.model.gguf import gguf_tokenizer, is_gguf
from zeta_core.model.located_model import LocatedModel


def locate_tokenizer(
    source: object,
    located: LocatedModel,
    locations: SourceLocations,
    cache: Path,
    *,
    on_ignored: OnIgnored = ignore_code,
) -> Any:
    """Load the named tokenizer, or the model's own, or the byte-level one. Raises `InvalidModel`.

    ``on_ignored`` is called if the files of a named tokenizer refer to code, which is never run.
    """
    from transformers import ByT5Tokenizer

    directory: Path | None = None
    match source:
        case None:
            directory = located.directory if located.has_tokenizer else None
        case str():
            local = Path(source).expanduser()
            if locations.any_path and local.is_dir():
                report_ignored_code(local, source, on_ignored)
                directory = local
            else:
                directory, _ = hub_copy(source, locations, cache, on_ignored, what="tokenizer")
        case _ if hasattr(source, "file"):
            directory = upload_copy(cast(Any, source).file, locations, cache)
        case _ if hasattr(source, "builtin"):
            directory = None
        case _ if hasattr(source, "get_vocab") and callable(source):
            return source  # a tokenizer object from a script
        case _:
            raise InvalidModel(
                f"tokenizer is {source!r:.200}; pass a tokenizer of transformers, its local directory or Hub id, or "
                '{"builtin": "bytes"}.'
            )
    if directory is None:
        return ByT5Tokenizer()
    from transformers import AutoTokenizer

    if is_gguf(directory):
        return gguf_tokenizer(directory)
    try:
        if _is_byte_level(directory):  # for some model families, AutoTokenizer would select another class
            return ByT5Tokenizer.from_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = lfs_pointer_fault(directory) or _missing_package(directory) or f"cannot be loaded: {error}"
        raise InvalidModel(f"The tokenizer in {directory.name} {reason}") from error


def _missing_package(directory: Path) -> str | None:
    """The fault of a tokenizer that only consists of a SentencePiece model, such as Llama 2's original one."""
    if find_spec("sentencepiece") is not None or (directory / "tokenizer.json").is_file():
        return None
    for file in sorted(directory.iterdir()):
        if file.suffix in (".model", ".spm") and file.is_file():
            with file.open("rb") as opened:
                is_protobuf = opened.read(1) == b"\x0a"  # tiktoken's files are text
            if is_protobuf:
                return (
                    f"is a SentencePiece model ({file.name}), which requires the package sentencepiece; install it: "
                    "pip install sentencepiece"
                )
    return None


def _is_byte_level(directory: Path) -> bool:
    """Whether the tokenizer in this directory is the byte-level one."""
    config = directory / "tokenizer_config.json"
    return config.is_file() and json.loads(config.read_bytes()).get("tokenizer_class") == "ByT5Tokenizer"
