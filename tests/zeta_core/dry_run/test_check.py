"""``python -m zeta_core check``: a dry run of a spec without weights, data or training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.advice_runs import train
from tests.zeta_core.models import LLAMA_CONFIG, llama
from tests.zeta_core.run_directories import ROOT, SPEC
from zeta_core.contract.job.check import CheckAnswer
from zeta_core.contract.wire.run_directory import file_key
from zeta_core.dry_run.check import check
from zeta_core.dry_run.process import main

BIG = {
    **LLAMA_CONFIG,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def answer_to(spec: dict[str, Any], **file: Any) -> CheckAnswer:
    return check(json.dumps({"spec": {**SPEC, **spec}, **file}))


WRONG = {**SPEC, "batch_size": -1, "optimiser": "adamw"}


def test_the_command_prints_only_json_and_sets_its_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spec.json"
    for spec, code in ((SPEC, 0), (WRONG, 1)):
        file.write_text(json.dumps(spec))
        assert main(str(file)) == code
        answer = CheckAnswer.model_validate_json(capfd.readouterr().out)
        assert answer.ok == (code == 0)
    assert {detail.param: detail.suggestion for detail in answer.details} == {
        "batch_size": None,
        "optimiser": "optimizer",
    }


def test_one_process_checks_files_one_by_one_until_its_input_ends(tmp_path: Path) -> None:
    (tmp_path / "wrong spec.json").write_text(json.dumps(WRONG))
    done = subprocess.run(
        [sys.executable, "-m", "zeta_core", "checks"],
        input=f"{tmp_path / 'wrong spec.json'}\n{tmp_path / 'none.json'}\n",
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # noqa: TID251 - a child's environment
    )
    assert done.returncode == 0, done.stderr
    answers = [CheckAnswer.model_validate_json(line) for line in done.stdout.splitlines()]
    codes = [{detail.code for detail in answer.details} for answer in answers]
    assert codes == [{"out_of_range", "unknown_field"}, {"check_failed"}]


def test_the_memory_of_a_small_model_is_exact_to_the_byte() -> None:
    answer = answer_to({"epochs": None})
    parameters = sum(parameter.numel() for parameter in llama().parameters())
    assert answer.ok
    assert (answer.num_parameters, answer.num_trained_parameters) == (parameters, parameters)
    assert answer.memory is not None
    assert (answer.memory.weights, answer.memory.gradients) == (4 * parameters, 4 * parameters)
    assert answer.memory.optimizer == 8 * parameters
    assert answer.isolates is True
    assert answer.vocabulary is not None
    assert (answer.vocabulary.embedding_rows, answer.vocabulary.tokenizer_size, answer.vocabulary.fits) == (
        384,
        384,
        True,
    )
    assert (answer.total_steps, answer.tokens) == (6, 6 * 4 * 32)
    assert answer.checkpoint_bytes == 12 * parameters
    resolved = answer.resolved_spec or {}
    assert (resolved["mixed_precision"], resolved["global_batch_size"], resolved["seed"]) == ("no", 4, 42)
    assert answer.pending == {}
    on_a_gpu = answer_to({"batch_size": None, "gradient_accumulate_every": None}, device="cuda", supports_bf16=True)
    resolved = on_a_gpu.resolved_spec or {}
    assert (resolved["mixed_precision"], resolved["batch_size"]) == ("bf16", 32), "the defaults of a GPU"


@pytest.mark.parametrize("options", [{}, {"use_activation_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_activations_are_estimated_close_to_what_autograd_keeps(options: dict[str, Any]) -> None:
    config = {**LLAMA_CONFIG, "num_hidden_layers": 6}
    answer = answer_to({"model": {"config": config}, "seq_len": 128, "batch_size": 4, **options})
    assert answer.memory is not None
    plain = answer_to({"model": {"config": config}, "seq_len": 128, "batch_size": 4}).memory
    assert plain is not None
    kept = dict[int, torch.Tensor]()
    model = llama(num_hidden_layers=6)
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(4, 128, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 0.9 * real < (plain.activations or 0) < 1.6 * real
    if options:
        assert 0 < (answer.memory.activations or 0) < 0.8 * (plain.activations or 0)


def test_logits_and_their_gradient_are_counted() -> None:
    spec = {"model": {"config": {**LLAMA_CONFIG, "vocab_size": 8192}}, "seq_len": 128, "batch_size": 4}
    memory = answer_to({**spec, "use_activation_checkpointing": True}).memory
    logits = 4 * 4 * 128 * 8192
    assert memory is not None
    assert 3 * logits < (memory.activations or 0) < 4 * logits, "the logits, their log-softmax, and its gradient"


@pytest.mark.extended
def test_seventy_billion_parameters_are_counted_without_allocating_them() -> None:
    spec = {"model": {"config": BIG}, "seq_len": 2048, "use_fsdp": True, "max_steps": None, "optimizer": "lion"}
    spec["learning_rate"] = "find"
    answer = answer_to(spec, processes=8)
    assert answer.num_parameters == 70_553_706_496
    assert answer.memory is not None
    assert answer.memory.weights == 4 * 70_553_706_496 // 8
    assert answer.memory.optimizer == answer.memory.weights
    assert answer.isolates is True
    assert answer.total_steps is None
    assert "tokenized" in answer.pending["total_steps"]
    assert (answer.resolved_spec or {"learning_rate": 1})["learning_rate"] is None
    assert "Unknown until a range test" in answer.pending["learning_rate"]


def test_only_the_parameters_of_an_adapter_are_trained() -> None:
    answer = answer_to({"lora": {"r": 4}})
    whole = answer_to({})
    assert answer.num_parameters == whole.num_parameters
    assert 0 < (answer.num_trained_parameters or 0) < (whole.num_parameters or 0) / 2
    assert answer.memory is not None
    assert answer.memory.optimizer == 8 * (answer.num_trained_parameters or 0)
    assert answer.memory.activations is not None


@pytest.mark.extended
@pytest.mark.parametrize("options", [{}, {"lora": {"r": 4}}, {"optimizer": "muon"}], ids=["all", "lora", "muon"])
def test_the_estimate_matches_the_memory_of_a_run_by_part(options: dict[str, Any], tmp_path: Path) -> None:
    estimate = answer_to(options).memory
    outcome, _ = train(tmp_path, llama(), {"max_steps": 1, "learning_rate": 1e-3, **options})
    held = outcome.result.memory
    assert estimate is not None
    assert held is not None
    assert held.gradients == estimate.gradients
    assert held.weights == pytest.approx(estimate.weights, rel=0.01)  # also contains buffers of a few bytes
    assert held.optimizer == pytest.approx(estimate.optimizer, rel=0.01)  # also contains a step count per tensor


def test_checking_a_pretrained_model_needs_only_its_config(tmp_path: Path) -> None:
    model: Any = llama()
    model.save_pretrained(tmp_path / "model")
    store = tmp_path / "artifacts" / file_key("file_1")
    store.parent.mkdir(parents=True)
    with tarfile.open(store, "w") as archive:
        archive.add(tmp_path / "model", "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    answer = answer_to(
        {"model": {"file": "file_1"}, "tokenizer": {"builtin": "bytes"}},
        artifacts_root=str(tmp_path / "artifacts"),
        cache_dir=str(tmp_path / "cache"),
        resolved_spec={"files": {"file_1": {"filename": "model.tar"}}},
    )
    assert answer.ok, answer.details
    assert answer.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "only the config was extracted from the archive"
    assert (answer.resolved_spec or {})["learning_rate"] == SPEC["learning_rate"]


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("model/config.json", tarfile.SYMTYPE, "is a link; tar the files themselves"),
        ("notes.txt", tarfile.LNKTYPE, "is a link; tar the files themselves"),
        ("../config.json", tarfile.REGTYPE, "is outside the folder"),
        ("/etc/passwd", tarfile.REGTYPE, "is outside the folder"),
        ("pipe", tarfile.FIFOTYPE, "is a device or another special file"),
    ],
)
def test_an_archive_with_unsafe_entries_is_rejected_with_their_name(
    name: str, kind: bytes, problem: str, tmp_path: Path
) -> None:
    store = tmp_path / "artifacts" / file_key("file_1")
    store.parent.mkdir(parents=True)
    with tarfile.open(store, "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "elsewhere"
        archive.addfile(entry)
    answer = answer_to(
        {"model": {"file": "file_1"}},
        artifacts_root=str(tmp_path / "artifacts"),
        cache_dir=str(tmp_path / "cache"),
        resolved_spec={"files": {"file_1": {"filename": "model.tar"}}},
    )
    [fault] = answer.details
    assert (fault.param, fault.code) == ("model", "invalid_model")
    assert fault.message.startswith(f"model.tar contains {name!r}, which {problem}")


@pytest.mark.parametrize(
    ("spec", "param", "code"),
    [
        ({"model": {"config": {"model_type": "nothing"}}}, "model", "invalid_model"),
        ({"model": "org/name"}, "model", "invalid_model"),
        ({"model": {"file": "file_9"}}, "model", "invalid_model"),
        ({"optimizer": "muon", "use_deepspeed": 2}, "optimizer", "invalid_value"),
    ],
)
def test_a_fault_names_its_field(spec: dict[str, Any], param: str, code: str) -> None:
    answer = answer_to(spec, hub=False)
    assert not answer.ok
    assert [(detail.param, detail.code) for detail in answer.details] == [(param, code)]


def test_input_that_is_not_json_is_reported() -> None:
    assert [detail.code for detail in check("{").details] == ["invalid_json"]


def shown_rows(folder: Path, selection: dict[str, Any], **spec: Any) -> CheckAnswer:
    """The answer to a request for rows of the files in the folder, as a worker writes it."""
    file = {"spec": spec, "data_root": str(folder), "shown": selection, "cache_dir": str(folder / "cache")}
    return check(json.dumps(file))


def test_rows_of_a_spec_without_a_model_are_shown_token_by_token(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [{"messages": chat}, {"messages": chat[:1]}, {"messages": chat * 100}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = shown_rows(tmp_path, {"rows": 3}, dataset={"path": "chats.jsonl"}, seq_len=64)
    assert answer.ok, answer.details
    assert answer.shown is not None
    first, rejected, long = answer.shown.data
    assert "".join(token.text for token in first.documents[0].tokens if token.trained) == "So.<|im_end|></s>"
    assert rejected.error is not None
    assert [len(document.tokens) for document in long.documents] == [2000], "an answer has a limited size"
    assert long.documents[0].num_tokens > 5000
    assert long.documents[0].tokens[64].truncated
    one = shown_rows(tmp_path, {"row": 2}, dataset={"path": "chats.jsonl"}).shown
    assert one is not None
    assert [row.place for row in one.data] == ["chats.jsonl, line 2"]


def test_faults_of_a_request_for_rows_are_reported_like_those_of_a_spec(tmp_path: Path) -> None:
    for spec in ({"dataset": {"path": "none.jsonl"}}, {"dataset": {"path": "/etc/passwd"}}):
        answer = shown_rows(tmp_path, {"rows": 1}, **spec)
        assert not answer.ok
        assert answer.details[0].message
