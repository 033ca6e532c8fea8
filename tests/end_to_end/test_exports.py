"""Exports of a LoRA checkpoint: a merged model, an adapter and GGUF files, compared with it and downloaded."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.harness.real_model import smollm2
from tests.harness.service import Service, processes_of_job
from tests.harness.waiting import wait_until
from zeta import Client
from zeta_core.contract.errors import InvalidRequest, ZetaError
from zeta_core.contract.job.kind import JobKind

OPTIONS: dict[str, Any] = {"seq_len": 64, "batch_size": 4, "gradient_accumulate_every": 1, "checkpointing_steps": 1000}
TIMEOUT_SECONDS = 600.0


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with Client(service.url, service.api_key) as client:
        yield client


@pytest.fixture(scope="module")
def adapter_job(service: Service, client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA job on a small model with the tokenizer and the chat template of SmolLM2."""
    folder = tmp_path_factory.mktemp("model")
    small_model(folder)
    data, questions = folder.with_name("chats.jsonl"), folder.with_name("questions.jsonl")
    data.write_text(conversation("Name the heron.") * 16)
    questions.write_text("".join(conversation(f"Which colour has heron {number}?") for number in range(12)))
    uploaded = service.command("upload", str(folder), "--json")
    assert uploaded.returncode == 0, uploaded.stdout + uploaded.stderr
    spec = {"model": {"file": json.loads(uploaded.stdout)["id"]}, "dataset": str(data), **OPTIONS}
    spec["eval_dataset"] = str(questions)
    job = client.submit({**spec, "lora": {"r": 4}, "learning_rate": 0.02, "max_steps": 12})
    ended = job.wait(timeout_seconds=TIMEOUT_SECONDS)
    assert ended.status == "succeeded", ended.error
    return ended.id


def conversation(question: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is blue."}]
    return f"{json.dumps({'messages': turns})}\n"


def small_model(folder: Path) -> None:
    """Write a small model with random weights and the tokenizer and chat template of SmolLM2."""
    path = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export(client: Client, job_id: str, directory: Path, to: str, weight_type: str | None = None) -> dict[str, Any]:
    """The certificate of an export, whose verified files are in ``directory``."""
    job = client.export(job_id, to, type=weight_type).wait(timeout_seconds=TIMEOUT_SECONDS)
    assert job.status == "succeeded", (job.error, "".join(client.logs(job.id)))
    assert job.kind is JobKind.EXPORT
    client.download(job.id, directory=directory)
    return json.loads((directory / "certificate.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS)
def test_exports_answer_like_the_checkpoint(client: Client, adapter_job: str, tmp_path: Path) -> None:
    merged = export(client, adapter_job, tmp_path / "merged", "merged", "f16")
    assert merged["token_agreement"] >= 0.95
    assert merged["kl_divergence"] < 0.01 < merged["base_kl_divergence"]
    assert (merged["prompt_source"], merged["prompt_reason"], len(merged["prompts"])) == ("eval_dataset", None, 8)
    assert all(prompt.startswith("questions.jsonl, line ") for prompt in merged["prompts"])
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype.itemsize == 2
    assert "vllm serve" in (tmp_path / "merged" / "README.md").read_text()

    adapter = export(client, adapter_job, tmp_path / "adapter", "adapter")
    assert adapter["token_agreement"] == 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert "--enable-lora --max-lora-rank 8 --lora-modules" in (tmp_path / "adapter" / "README.md").read_text()
    assert not (tmp_path / "adapter" / "training_state").exists()
    assert {job.spec["to"] for job in client.exports(adapter_job)} == {"merged", "adapter"}
    assert {job.id for job in client.exports(adapter_job)} <= {job.id for job in client.jobs(kind="export")}


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS)
def test_gguf_files_answer_like_the_checkpoint(client: Client, adapter_job: str, tmp_path: Path) -> None:
    for weight_type in ("f16", "q8_0"):
        directory = tmp_path / weight_type
        certificate = export(client, adapter_job, directory, "gguf", weight_type)
        assert certificate["token_agreement"] >= 0.9
        assert certificate["kl_divergence"] < 0.02 < certificate["base_kl_divergence"]
        assert certificate["same_template"]
        assert certificate["same_prompt_tokens"]
        modelfile = (directory / "Modelfile").read_text()
        assert modelfile.startswith(f"FROM ./model-{weight_type}.gguf\nTEMPLATE ")
        assert 'PARAMETER stop "<|im_end|>"' in modelfile
        assert f"vllm serve ./model-{weight_type}.gguf --tokenizer . " in (directory / "README.md").read_text()
        assert AutoTokenizer.from_pretrained(directory).chat_template


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_exports_that_make_no_sense_are_refused(client: Client, adapter_job: str) -> None:
    for job_id, to, weight_type, param in (
        (adapter_job, "adapter", "f16", "type"),
        (adapter_job, "merged", "q8_0", "type"),
        (adapter_job, "onnx", None, "to"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            client.export(job_id, to, type=weight_type)
        assert refused.value.param == param
    with pytest.raises(ZetaError, match="no checkpoint"):
        client.export(adapter_job, "merged", checkpoint="step-999")


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS)
def test_an_interrupted_export_shows_no_half_files_and_starts_again(
    client: Client, adapter_job: str, tmp_path: Path
) -> None:
    def started() -> Any:
        job = client.export(adapter_job, "merged", type="f16")
        wait_until(lambda: processes_of_job(job.id), 120, "the export to start")
        return job

    killed = started()
    for process_id in processes_of_job(killed.id):
        os.kill(process_id, signal.SIGKILL)
    assert client.checkpoints(killed.id) == []
    assert killed.wait(timeout_seconds=TIMEOUT_SECONDS).status == "succeeded"
    assert len(client.job(killed.id).attempts) == 2
    client.download(killed.id, directory=tmp_path)  # compares every file with the manifest
    assert json.loads((tmp_path / "certificate.json").read_text())["token_agreement"] >= 0.95

    paused = started()
    paused.pause()
    wait_until(lambda: client.job(paused.id).status == "paused", 60, "the export to pause")
    assert client.checkpoints(paused.id) == []
    paused.resume()
    assert paused.wait(timeout_seconds=TIMEOUT_SECONDS).status == "succeeded"

    cancelled = started()
    cancelled.cancel()
    assert cancelled.wait(timeout_seconds=TIMEOUT_SECONDS).status == "cancelled"
    assert client.checkpoints(cancelled.id) == []
    with pytest.raises(ZetaError, match="before it saved a checkpoint"):
        client.download(cancelled.id, directory=tmp_path / "cancelled")


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_SECONDS)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_an_export_survives_the_end_of_its_worker(
    service: Service, client: Client, adapter_job: str, tmp_path: Path, end: signal.Signals
) -> None:
    """A worker that stops hands the export back, and one that was killed adopts it after its restart."""

    def worker() -> int:
        return json.loads((service.home / "up.json").read_text())["children"]["worker"]

    before = worker()
    job = client.export(adapter_job, "merged", type="f16")
    wait_until(lambda: processes_of_job(job.id), 120, "the export to start")
    os.kill(before, end)
    assert client.checkpoints(job.id) == []
    wait_until(lambda: worker() != before, 120, "the worker to be restarted")
    assert job.wait(timeout_seconds=TIMEOUT_SECONDS).status == "succeeded"
    assert [checkpoint.name for checkpoint in client.checkpoints(job.id)] == ["final"]
    client.download(job.id, directory=tmp_path)  # compares every file with the manifest
    assert json.loads((tmp_path / "certificate.json").read_text())["token_agreement"] >= 0.95
    wait_until(lambda: not processes_of_job(job.id), 60, "no process of the export to be left")
