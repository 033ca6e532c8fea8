"""Model archives with arbitrary files, created in memory."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from typing import Any

PICKLE = b"\x80\x04K\x01."  # of the number 1
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 64,
}


def pack_tar(files: Mapping[str, object]) -> bytes:
    """A .tar of files: bytes and text unchanged, other values as JSON."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            if not isinstance(content, (bytes, str)):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def model_files(**files: object) -> dict[str, object]:
    """The files of a model with a config; ``a__json`` stands for ``a.json``."""
    return {"config.json": CONFIG, **{name.replace("__", "."): content for name, content in files.items()}}


def safetensors_file(header: object = None, data: bytes = b"\0" * 8, *, length: int | None = None) -> bytes:
    """A safetensors file with one tensor of two numbers, or with the given header."""
    if header is None:
        header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
