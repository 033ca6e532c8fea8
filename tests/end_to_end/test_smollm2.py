"""A real model, SmolLM2-135M, fine-tuned on real conversations and preferences through the whole service, on a CPU.

The adapters train for a few steps with high learning rates, so the effect shows within minutes.
"""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.real_conversations import as_lines, real_conversations
from tests.harness.real_model import smollm2
from tests.harness.service import Service, wait_for_end

JOB_SECONDS = 600.0  # for each of the three jobs; on two idle cores, each takes about a quarter of it
SIZES: dict[str, Any] = {"seq_len": 192, "batch_size": 2, "gradient_accumulate_every": 1, "checkpointing_steps": 1000}
QUESTION = [{"role": "user", "content": "Hello, how are you doing today?"}]


@pytest.mark.long
@pytest.mark.timeout(3 * JOB_SECONDS)
def test_a_real_model_learns_from_real_conversations_and_preferences(
    http: httpx.Client, service: Service, tmp_path: Path
) -> None:
    uploaded = service.command("upload", str(smollm2()), "--json")
    assert uploaded.returncode == 0, uploaded.stdout + uploaded.stderr
    base = json.loads(uploaded.stdout)
    assert base["purpose"] == "model"
    conversations = real_conversations(128)
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(as_lines([{"messages": turns} for turns in conversations]))

    # Train an adapter from the command line.
    settings = [*_words(SIZES), "eval_split=0.06", "eval_steps=4", "max_steps=8", "learning_rate=0.001"]
    words = [word for setting in (*settings, "lora.save_merged=true") for word in ("--set", setting)]
    source = ["--model", base["id"], "--data", str(chats), "--lora"]
    followed = service.command("submit", *source, *words, "--follow", timeout_seconds=JOB_SECONDS)
    assert followed.returncode == 0, followed.stdout + followed.stderr + service.log()
    assert "held-out loss" in followed.stdout
    tuned = json.loads(service.command("job", "@last", "--json").stdout)
    assert tuned["resolved_spec"]["train_on"] == "assistant"
    events = _events(http, tuned)
    held_out = _held_out_losses(events)
    assert list(held_out) == [4, 8]
    assert held_out[8] < held_out[4]
    lines = {
        step: [event["text"] for event in events if event["type"] == "sample" and event["step"] == step]
        for step in held_out
    }
    assert len(lines[8]) == 3
    prompts = [event["prompt"] for event in events if event["type"] == "sample"]
    assert all(prompt.endswith("<|im_end|>\n<|im_start|>assistant\n") for prompt in prompts), prompts
    assert lines[4] != lines[8]
    _check_adapter_on_published_base(service, tuned["id"], tmp_path / "adapter")

    # Full fine-tuning over HTTP, at its default learning rate.
    data = {"dataset": tuned["spec"]["dataset"], "model": {"file": base["id"]}}
    full = _run(http, service, {**data, **SIZES, "eval_split": 0.06, "eval_steps": 1, "max_steps": 3})
    assert full["resolved_spec"]["learning_rate"] == 2e-5
    assert full["resolved_spec"]["num_trained_parameters"] == full["resolved_spec"]["num_parameters"] == 134_515_008
    losses = _held_out_losses(_events(http, full))
    assert losses[1] > losses[2] > losses[3]

    # The real next turn is preferred to a turn of another conversation. The run starts from the adapter's model.
    pairs = [
        {"prompt": turns[:3], "chosen": turns[3:], "rejected": other[3:]}
        for turns, other in zip(conversations[:6], conversations[6:12], strict=True)
    ]
    sent = http.post("/v1/files", files={"file": ("pairs.jsonl", as_lines(pairs))}, data={"purpose": "dataset"})
    method = {"method": "dpo", "lora": {"r": 8}, "learning_rate": 5e-4, "max_steps": 6}
    source = {"model": {"job": tuned["id"]}, "dataset": {"file": sent.raise_for_status().json()["id"]}}
    preferred = _run(http, service, {**SIZES, **source, **method})
    updates = [event for event in _events(http, preferred) if event.get("rewards")]
    assert updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert updates[0]["rewards"]["margin"] == pytest.approx(0, abs=1e-3)
    assert updates[-1]["rewards"]["margin"] > 0.1, updates
    assert updates[-1]["rewards"]["accuracy"] == 1.0


def _check_adapter_on_published_base(service: Service, job_id: str, folder: Path) -> None:
    """Load the adapter with peft on the published base model, and compare the merged weights with peft's (bfloat16)."""
    downloaded = service.command("download", job_id, "-o", str(folder))
    assert downloaded.returncode == 0, downloaded.stdout + downloaded.stderr
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    file = smollm2()
    untouched: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    before = _logits(untouched, prompt)
    adapted: Any = PeftModel.from_pretrained(untouched, str(folder))
    with_adapter = _logits(adapted, prompt)
    change = (with_adapter - before).abs().max()
    assert change > 1
    merged: Any = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    assert (_logits(merged, prompt) - with_adapter).abs().max() < 0.05 * change  # bfloat16 has three digits
    stored = merged.state_dict()
    for name, weight in adapted.merge_and_unload().state_dict().items():
        assert torch.equal(weight.bfloat16().float(), stored[name]), name


def _logits(model: Any, prompt: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**prompt).logits


def _run(http: httpx.Client, service: Service, spec: dict[str, Any]) -> dict[str, Any]:
    """Run a job that must succeed."""
    response = http.post("/v1/jobs", json=spec)
    assert response.status_code == 201, response.text
    job = wait_for_end(http, response.json()["id"], JOB_SECONDS)
    assert job["status"] == "succeeded", service.log()
    return job


def _events(http: httpx.Client, job: dict[str, Any]) -> list[dict[str, Any]]:
    return http.get(f"/v1/jobs/{job['id']}/events?limit=1000").raise_for_status().json()["data"]


def _held_out_losses(events: list[dict[str, Any]]) -> dict[int, float]:
    return {event["step"]: event["eval_loss"] for event in events if event.get("eval_loss") is not None}


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]
