"""Uploading the local files of a spec, and packing model folders."""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from zeta.job_ids import with_full_job
from zeta.local_inputs import looks_like_a_model, pack_model, upload_local
from zeta_core.contract.errors import InvalidRequest, InvalidSpec
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.job import Job
from zeta_core.contract.job.responses import FilePurpose, StoredFile


class Sent:
    """Records the files to upload. The upload itself is tested with a real server."""

    def __init__(self) -> None:
        self.files: list[tuple[str, FilePurpose]] = []
        self.ids: list[str] = []

    def __call__(self, path: Path, purpose: FilePurpose) -> StoredFile:
        content = path.read_bytes()
        self.files.append((path.name, purpose))
        self.ids.append(new_id("file"))
        return StoredFile(
            id=self.ids[-1],
            filename=path.name,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            purpose=purpose,
            created_at=datetime.now(UTC),
        )


def resolved(spec: dict[str, Any], sent: Sent) -> dict[str, Any]:
    return upload_local(spec, sent, lambda _: None)


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("x")
    (folder / "training_state").mkdir()
    (folder / "training_state" / "optimizer.bin").write_text("x")
    return folder


def test_a_local_file_is_uploaded_and_replaced_by_its_id(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some text")
    for given in (str(file), {"file": str(file)}):
        sent = Sent()
        assert resolved({"dataset": given}, sent) == {"dataset": {"file": sent.ids[0]}}
        assert sent.files == [("text.txt", "dataset")]


def test_the_other_fields_of_a_source_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    sent = Sent()
    spec = resolved({"dataset": [{"file": str(file), "columns": {"text": "body"}}, {"builtin": "python-docs"}]}, sent)
    expected = [{"file": sent.ids[0], "columns": {"text": "body"}}, {"builtin": "python-docs"}]
    assert spec == {"dataset": expected}


def test_the_files_of_a_folder_are_uploaded_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "notes.pdf"):
        (tmp_path / name).write_text(name)
    sent = Sent()
    assert resolved({"dataset": str(tmp_path)}, sent) == {"dataset": {"file": sent.ids}}
    assert sent.files == [("a.txt", "dataset"), ("b.txt", "dataset")]


def test_used_and_skipped_files_are_reported_before_the_upload(tmp_path: Path) -> None:
    for name in ("rows.JSONL", "text.md", "ids.bin", "test.jsonl", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    messages: list[str] = []
    sent = Sent()
    spec = upload_local({"dataset": str(tmp_path), "eval_dataset": str(tmp_path)}, sent, messages.append)
    trained, evaluated = spec["dataset"]["file"], spec["eval_dataset"]["file"]
    assert dict(zip(sent.ids, [name for name, _ in sent.files], strict=True)) == {
        trained[0]: "rows.JSONL",
        trained[1]: "text.md",
        evaluated[0]: "rows.JSONL",
        evaluated[1]: "test.jsonl",
        evaluated[2]: "text.md",
    }
    assert messages[0].startswith(f"Using 2 data files of {tmp_path} (1 .jsonl, 1 .md): rows.JSONL, text.md. Skipped 3")
    assert "ids.bin (not one of" in messages[0]
    assert "test.jsonl (held-out split: use it as eval_dataset" in messages[0]
    sent = Sent()
    upload_local({"dataset": str(tmp_path), "use_pretokenized": True}, sent, messages.append)
    assert [name for name, _ in sent.files] == ["ids.bin", "rows.JSONL"]


def test_a_folder_without_data_is_rejected_with_its_skipped_files(tmp_path: Path) -> None:
    for name in ("README.md", "validation.jsonl", "scan.pdf"):
        (tmp_path / name).write_text(name)
    with pytest.raises(InvalidRequest) as caught:
        resolved({"dataset": str(tmp_path)}, Sent())
    for words in ("no data file", "README.md (documentation)", "validation.jsonl (held-out split", "scan.pdf (not one"):
        assert words in caught.value.message
    sent = Sent()
    resolved({"dataset": str(tmp_path / "validation.jsonl")}, sent)
    assert sent.files == [("validation.jsonl", "dataset")]


def test_folders_and_files_of_one_source_are_uploaded_in_order(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for name in ("z.txt", "many/a.txt", "many/b.txt"):
        (tmp_path / name).write_text(name)
    sent, known = Sent(), new_id("file")
    given = [str(tmp_path / "z.txt"), str(tmp_path / "many"), known]
    assert resolved({"dataset": {"file": given}}, sent) == {"dataset": {"file": [*sent.ids, known]}}
    assert [name for name, _ in sent.files] == ["z.txt", "a.txt", "b.txt"]


def test_a_chat_template_in_a_file_is_sent_as_its_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}")
    for given in (str(file), "{{ messages }}"):
        assert resolved({"chat_template": given}, Sent()) == {"chat_template": "{{ messages }}"}
    assert resolved({"chat_template": "tool_use"}, Sent()) == {"chat_template": "tool_use"}
    with pytest.raises(InvalidSpec, match=r"chat_template is .*none\.jinja', which cannot be read: No such file"):
        resolved({"chat_template": str(tmp_path / "none.jinja")}, Sent())


def test_sources_that_are_not_local_are_converted_to_objects() -> None:
    file, job = new_id("file"), new_id("job")
    sent = Sent()
    assert resolved({"dataset": file}, sent) == {"dataset": {"file": file}}
    assert resolved({"dataset": "hub:org/name"}, sent) == {"dataset": {"hub": "org/name"}}
    assert resolved({"dataset": "path:corpus/*.txt"}, sent) == {"dataset": {"path": "corpus/*.txt"}}
    assert resolved({"dataset": "python-docs"}, sent) == {"dataset": {"builtin": "python-docs"}}
    assert resolved({"model": "org/name@main"}, sent) == {"model": "org/name@main"}
    assert resolved({"model": f"{job}/step-5"}, sent) == {"model": {"job": job, "checkpoint": "step-5"}}
    assert resolved({"model": job}, sent) == {"model": {"job": job}}
    assert resolved({"model": file}, sent) == {"model": {"file": file}}
    untouched = {"model": {"config": {"model_type": "llama"}}, "dataset": {"path": "x.txt"}, "seed": 1}
    assert resolved(untouched, sent) == untouched
    assert sent.files == []


@pytest.mark.parametrize(
    "spec",
    [
        {"dataset": "missing.txt"},
        {"dataset": "hub:missing"},
        {"dataset": ["hub:missing/../x"]},
        {"eval_dataset": "hub:/missing"},
        {"dataset": {"file": "missing.txt"}},
        {"model": "./missing"},
        {"model": {"file": "missing.tar"}},
    ],
)
def test_a_missing_path_is_rejected_with_field_and_value(spec: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="missing") as caught:
        resolved(spec, Sent())
    assert caught.value.param is not None
    assert caught.value.param.startswith(("dataset", "eval_dataset", "model"))


def test_a_model_folder_is_packed_as_a_tar_of_its_visible_files(tmp_path: Path) -> None:
    target = tmp_path / "model.tar"
    pack_model(model_folder(tmp_path / "llama"), target)
    with tarfile.open(target) as archive:
        assert archive.getnames() == ["config.json", "model.safetensors"]
    sent = Sent()
    assert resolved({"model": str(tmp_path / "llama")}, sent) == {"model": {"file": sent.ids[0]}}
    assert sent.files == [("llama.tar", "model")]


def test_packing_the_same_model_always_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.tar", tmp_path / "second.tar"
    pack_model(model_folder(tmp_path / "one"), first)
    other = model_folder(tmp_path / "elsewhere" / "two")
    os.utime(other / "config.json", (0, 0))
    weights = other / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")  # as in the Hub's cache
    pack_model(other, second)
    assert first.read_bytes() == second.read_bytes()


def test_a_gguf_file_is_packed_by_itself(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    pack_model(tmp_path / "small.gguf", tmp_path / "small.tar")
    with tarfile.open(tmp_path / "small.tar") as archive:
        assert archive.getnames() == ["small.gguf"]
    is_model = {name: looks_like_a_model(tmp_path / name) for name in ("small.gguf", "small.tar", "text.jsonl", "")}
    assert is_model == {"small.gguf": True, "small.tar": True, "text.jsonl": False, "": True}


def test_a_config_file_describes_a_model_trained_from_scratch(tmp_path: Path) -> None:
    file = model_folder(tmp_path / "llama") / "config.json"
    assert resolved({"model": str(file)}, Sent()) == {"model": {"config": {"model_type": "llama"}}}
    for text in ("{", "[]", "{}", '{"model_type": "llama", "model_type": "gpt2"}', "[" * 100_000, '{"a": "\\udc80"}'):
        file.write_text(text)
        with pytest.raises(InvalidRequest, match=r"config\.json"):
            resolved({"model": str(file)}, Sent())


def test_a_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        resolved({"model": str(tmp_path)}, Sent())
    (tmp_path / "notes.txt").write_text("no tar")
    with pytest.raises(InvalidRequest, match=r"not a \.tar archive"):
        resolved({"model": str(tmp_path / "notes.txt")}, Sent())


def test_the_home_directory_of_an_unknown_user_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (
        {"dataset": "~nouser/x.jsonl"},
        {"dataset": {"file": "~nouser/x.jsonl"}},
        {"model": "~nouser/model"},
        {"chat_template": "~nouser/chat.jinja"},
    ):
        with pytest.raises(InvalidRequest, match="home directory of a user that does not exist here"):
            resolved(spec, Sent())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nouser.txt").write_text("text")
    sent = Sent()
    assert resolved({"dataset": "~nouser.txt"}, sent) == {"dataset": {"file": sent.ids[0]}}


def test_a_model_name_longer_than_a_file_name_is_not_a_file() -> None:
    class NoJobs:
        def jobs(self, *, limit: int | None = 20) -> Sequence[Job]:
            raise AssertionError(f"no jobs are needed, but {limit} were requested")

    spec = {"model": "x" * 300}
    assert with_full_job(NoJobs(), spec) == spec
