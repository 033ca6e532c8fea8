"""Weights of an uploaded model must be well-formed safetensors or GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.harness.model_archives import PICKLE, model_files, safetensors_file
from tests.harness.model_checks import check_upload, rejection
from zeta_core.system.model_files.gguf import TENSOR_TYPES


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


def number(value: int, form: str = "<Q") -> bytes:
    return struct.pack(form, value)


def text(value: str) -> bytes:
    return number(len(value)) + value.encode()


def gguf_file(metadata: bytes = b"", described: bytes = b"", data: int = 0, **counts: int) -> bytes:
    """A GGUF file with this metadata and these descriptions of tensors; by default, it counts one of each given."""
    num_tensors, num_values = counts.get("tensors", int(bool(described))), counts.get("values", int(bool(metadata)))
    head = b"GGUF" + number(counts.get("version", 3), "<I") + number(num_tensors) + number(num_values)
    content = head + metadata + described
    return content + b"\0" * (-len(content) % 32 + data)


def value(kind: int, content: bytes, key: str = "a") -> bytes:
    return text(key) + number(kind, "<I") + content


def tensor(shape: Sequence[int] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = number(len(shape), "<I") + b"".join(map(number, shape))
    return text("x") + dimensions + number(kind, "<I") + number(offset)


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (PICKLE, "is not a GGUF file"),
        (b"GGUF", "but only 0 are left"),
        (gguf_file(version=1), "has version 1"),
        (gguf_file(version=3 << 24), "only versions 2 and 3 (little-endian)"),
        (gguf_file(tensors=HUGE), "more than any model has"),
        (gguf_file(values=HUGE), "more than any model has"),
        (gguf_file(values=9), "it is truncated or damaged"),
        (gguf_file(number(HUGE)), "has a key of 1152921504606846976 bytes"),
        (gguf_file(value(77, b"")), "of the unknown type 77"),
        (gguf_file(value(8, number(HUGE))), "claims 1152921504606846976 bytes for its string"),
        (gguf_file(value(9, number(4, "<I") + number(HUGE))), "bytes for its values"),
        (gguf_file(value(9, number(8, "<I") + number(HUGE))), "bytes for its values"),
        (gguf_file(value(9, (number(9, "<I") + number(1)) * 9)), "of the unknown type 9"),
        (gguf_file(value(4, number(12, "<I"), "general.alignment")), "not a power of two"),
        (gguf_file(value(8, text("x"), "general.alignment")), "not a power of two"),
        (gguf_file(b"", tensor((32,) * 5)), "with 5 dimensions"),
        (gguf_file(b"", tensor(kind=77), 256), "of type 77, which is not supported"),
        (gguf_file(b"", tensor((31,), kind=8), 256), "which is not a multiple of 32"),
        (gguf_file(b"", tensor(offset=8), 256), "at byte 8, which is not a multiple of 32"),
        (gguf_file(b"", tensor(offset=HUGE), 256), "but its header describes"),
        (gguf_file(b"", tensor((HUGE, HUGE)), 256), "but its header describes"),
        (gguf_file(b"", tensor(), 255), "it is truncated or damaged"),
        (gguf_file(b"", tensor() + tensor(), 512, tensors=2), "overlapping tensors at byte 0"),
    ],
)
def test_a_gguf_file_must_contain_what_its_header_describes(tmp_path: Path, content: bytes, expected: str) -> None:
    message = rejection(tmp_path, {"model.gguf": content})
    assert expected in message, message


def test_gguf_files_of_the_library_are_accepted_with_every_type_of_values_and_tensors(tmp_path: Path) -> None:
    from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter

    assert {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()} == TENSOR_TYPES, "as in the newest library"
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", ""])
    writer.add_array("scores", [0.5, 1.5])
    writer.add_bool("b", True)
    writer.add_uint64("c", 1 << 40)
    for number_of_tensor, kind in enumerate(GGML_QUANT_SIZES):
        block, size = GGML_QUANT_SIZES[kind]
        raw = np.zeros((3, size * (256 // block)), dtype=np.uint8)
        writer.add_tensor(f"x{number_of_tensor}", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (tmp_path / "model.gguf").read_bytes()
    assert len(GGUFReader(tmp_path / "model.gguf").tensors) == len(GGML_QUANT_SIZES)
    check_upload(tmp_path, {"model.gguf": content})
    assert "truncated" in rejection(tmp_path, {"model.gguf": content[:-300]})
