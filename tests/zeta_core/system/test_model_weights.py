"""Weights of an uploaded model must be well-formed safetensors or GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.model_archives import PICKLE, model_files, safetensors_file
from tests.harness.model_checks import check_upload, rejection


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (PICKLE, "is not a safetensors file"),
        (b"PK\3\4" + b"\0" * 100, "is not a safetensors file"),
        (b"", "is not a safetensors file"),
        (safetensors_file(length=1 << 40), "claims a header of 1099511627776"),
        (safetensors_file(length=1000), "claims a header of 1000 "),
        (safetensors_file(b'{"x": 1'), "is not valid JSON"),
        (
            safetensors_file({"x": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}),
            "of dtype 'Q9', which is not supported",
        ),
        (safetensors_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}), "at byte 4 instead of 0"),
        (safetensors_file({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "does not match"),
        (safetensors_file({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "malformed shape"),
        (
            safetensors_file({"x": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}),
            "does not match",
        ),
        (safetensors_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}), "does not match"),
        (safetensors_file({"x": {"dtype": "F32", "shape": [2]}}), "malformed shape or data_offsets"),
        (safetensors_file({"x": 3}), "of dtype 'None', which is not supported"),
        (safetensors_file(data=b"\0" * 9), "has 78 bytes, but its header describes 77"),
        (safetensors_file(data=b"\0" * 4), "it is truncated or damaged"),
        (safetensors_file({"__metadata__": {"a": {}}}, b""), "__metadata__"),
    ],
)
def test_malformed_safetensors_are_rejected(tmp_path: Path, content: bytes, expected: str) -> None:
    message = rejection(tmp_path, {**model_files(), "model.safetensors": content})
    assert "model.tar: model.safetensors " in message
    assert expected in message, message


def test_tensors_that_share_bytes_are_rejected(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "at byte 0 instead of 8" in rejection(
        tmp_path, model_files(model__safetensors=safetensors_file({"x": one, "y": one}))
    )


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "BF16", "F8_E4M3", "C64", "BOOL"])
def test_safetensors_of_every_dtype_are_accepted(tmp_path: Path, dtype: str) -> None:
    import safetensors as library

    bits = {"F4": 4, "F6_E2M3": 6, "BF16": 16, "F8_E4M3": 8, "C64": 64, "BOOL": 8}[dtype]
    content = safetensors_file({"x": {"dtype": dtype, "shape": [4, 2], "data_offsets": [0, bits]}}, b"\0" * bits)
    check_upload(tmp_path, {**model_files(), "model.safetensors": content})
    assert library.deserialize(content)[0][1]["dtype"] == dtype, "and the library agrees"


def test_a_gguf_file_must_start_with_its_signature(tmp_path: Path) -> None:
    check_upload(tmp_path, {"model.gguf": b"GGUF" + b"\0" * 20})
    assert "model.gguf is not a GGUF file" in rejection(tmp_path, {"model.gguf": PICKLE})
