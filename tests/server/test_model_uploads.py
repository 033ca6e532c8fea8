"""Uploaded models are checked before they are stored; unsafe ones are rejected."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import httpx
import pytest

from tests.harness.model_archives import CONFIG, model_files, pack_tar, safetensors_file
from tests.server.server_process import SPEC, ServerProcess, error_of


def upload(http: httpx.Client, content: bytes) -> httpx.Response:
    return http.post("/v1/files", files={"file": ("model.tar", content)}, data={"purpose": "model"})


def link(name: str, target: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        archive.addfile(entry)
    return made.getvalue()


def sparse(num_bytes: int) -> bytes:
    """An archive of 10 KB with a file that claims ``num_bytes``, as GNU tar --sparse writes it."""
    entry = tarfile.TarInfo("config.json")
    entry.type = b"S"
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (num_bytes, 0)  # one empty piece, at the end
    header[483:495] = b"%011o\0" % num_bytes
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    return bytes(header) + b"\0" * (10240 - 512)


INDEX = {"metadata": {}, "weight_map": {"x": "/srv/jobs/job_1/checkpoints/final/model.safetensors"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pack_tar(
                model_files(
                    tokenizer_config__json={"tokenizer_class": "BertTokenizer", "vocab": "/home/zeta/admin.key"}
                )
            ),
            "model.tar: tokenizer_config.json has 'vocab' = '/home/zeta/admin.key'; it must name a file in",
        ),
        (
            pack_tar(model_files(special_tokens_map__json={"vocab_file": "/proc/self/environ"})),
            "model.tar: special_tokens_map.json has 'vocab_file' = '/proc/self/environ'; it must name a file",
        ),
        (
            pack_tar({**model_files(), "model.safetensors.index.json": INDEX}),
            "has 'weight_map.x' = '/srv/jobs/job_1/checkpoints",
        ),
        (
            pack_tar(model_files(model__safetensors=b"\x80\x04K\x01.")),
            "model.tar: model.safetensors is not a safetensors file",
        ),
        (
            pack_tar({"config.json": {**CONFIG, "attn_implementation": "owner/kernel"}}),
            "'attn_implementation' = 'owner/ke",
        ),
        (
            pack_tar({"config.json": {**CONFIG, "auto_map": {"AutoConfig": "evil.C"}}, "evil.py": ""}),
            "has 'auto_map' = ",
        ),
        (link("vocab.txt", "/etc/passwd"), "model.tar contains 'vocab.txt', which is a link"),
        (pack_tar({"../config.json": CONFIG}), "model.tar contains '../config.json', which is outside the folder"),
        (pack_tar({"config.json": b'{"a":' * 100_000}), "config.json is nested more than 64 levels deep"),
        (sparse(6_600_000_000), "model.tar contains 'config.json', which is a sparse file"),
    ],
)
def test_an_unsafe_model_is_rejected_and_removed(
    server: ServerProcess, http: httpx.Client, content: bytes, message: str
) -> None:
    response = upload(http, content)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (422, "invalid_model", "file"), response.text
    assert message in error["message"]
    assert list((server.settings.artifacts / "incoming").iterdir()) == []


@pytest.mark.extended
def test_claimed_sizes_in_an_archive_use_no_server_memory(server: ServerProcess, http: httpx.Client) -> None:
    """Neither for sparse files nor for JSON that needs hundreds of megabytes when parsed."""
    assert upload(http, pack_tar(model_files())).status_code == 201
    before = server.peak_memory_bytes()
    large = b'{"a": [' + b"1.5," * 7_000_000 + b"0]}"
    assert upload(http, sparse(1 << 33)).status_code == 422
    assert upload(http, pack_tar(model_files(any__json=large))).status_code == 201
    assert server.peak_memory_bytes() - before < 100 << 20, "the body itself passes through in pieces"


def test_an_archive_that_makes_tarfile_hang_is_rejected(http: httpx.Client) -> None:
    """CVE-2024-6232: a pax header of spaces and digits."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = b"x", 1_000_000
    content = header.tobuf(tarfile.GNU_FORMAT) + (b"1" * 1_000_000).ljust(1_000_448, b"\0")
    response = upload(http, content)
    assert response.status_code == 422
    assert "has an extended header of 1000000 bytes" in error_of(response)["message"]


def test_a_real_model_is_stored_and_used(http: httpx.Client, tmp_path: Path) -> None:
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"/etc/passwd": 0}, "merges": []}}
    config = {**CONFIG, "_name_or_path": "/home/me/out/checkpoint-5"}
    files = model_files(
        config__json=config,
        model__safetensors=safetensors_file(),
        tokenizer__json=tokenizer,
        tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer", "bos_token": "/", "model_max_length": 10**30},
        training_args__bin=b"\x80\x04K\x01.",
    )
    response = upload(http, pack_tar(files))
    assert response.status_code == 201, response.text
    assert http.post("/v1/jobs", json={**SPEC, "model": {"file": response.json()["id"]}}).status_code == 201


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("hub", name) for name in ("text", "json", "csv", "parquet", "arrow", "xml", "imagefolder", "webdataset")],
        *[("hub", name) for name in ("squad", "owner/name@main", "owner/name/file.txt", "owner/..", "hf://a/b")],
        *[("config", name) for name in ("../x", "a/b", "file:///etc", "~", "")],
        *[("split", name) for name in ("/etc/passwd", "train/../x", "https://host/x")],
        *[("revision", name) for name in ("../../x", "refs/../x", "https://host", "a/b")],
    ],
)
def test_hub_datasets_need_an_owner_and_plain_names(http: httpx.Client, field: str, value: str) -> None:
    response = http.post("/v1/jobs", json={**SPEC, "dataset": {"hub": "owner/name", field: value}})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (422, f"dataset.{field}", "invalid_value")
    assert json.dumps(value)[1:-1] in error["message"]
    if field == "hub":
        assert "for a file, or upload it with POST /v1/files" in error["message"]
