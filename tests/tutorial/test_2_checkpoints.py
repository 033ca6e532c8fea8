"""Lesson 2: download a checkpoint, verify it, and use it."""

import hashlib
from pathlib import Path
from typing import Any

from zeta import Client
from zeta_core.contract.job.job import Job


def test_list_checkpoints_and_read_a_manifest(client: Client, finished_job: Job) -> None:
    assert "final" in [checkpoint.name for checkpoint in client.checkpoints(finished_job.id)]

    manifest = client.checkpoint(finished_job.id, "final")
    assert manifest.step == 4
    (weights,) = [file for file in manifest.files if file.role == "weights"]  # every file has a SHA-256
    assert (weights.path, len(weights.sha256)) == ("model.safetensors", 64)


def test_download_and_verify_a_model(client: Client, finished_job: Job, tmp_path: Path) -> None:
    download = client.download(finished_job.id, directory=tmp_path / "model")  # verifies every file
    for file in download.files:
        assert hashlib.sha256((download.directory / file.path).read_bytes()).hexdigest() == file.sha256


def test_load_the_model_with_transformers(client: Client, finished_job: Job, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = client.download(finished_job.id, directory=tmp_path / "model").directory
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The ", return_tensors="pt", add_special_tokens=False)
    generated = model.generate(prompt.input_ids, max_new_tokens=4)
    assert generated.shape[1] > prompt.input_ids.shape[1]
