"""Fine-tuning with the whole service: training, evaluating and downloading an adapter on another job's model."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.end_to_end.specs import tiny_job
from tests.harness.service import Service, wait_for_end

PROMPT = torch.arange(40, 72)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT).logits


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_adapter_is_trained_evaluated_and_downloaded(http: httpx.Client, service: Service, tmp_path: Path) -> None:
    # Settings that would have no effect are rejected.
    for fields, param in (
        ({"early_stopping_patience": 2}, "early_stopping_patience"),
        ({"eval_split": 0.9}, "eval_split"),
    ):
        refused = http.post("/v1/jobs", json=tiny_job(**fields))
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, param)

    base = wait_for_end(http, http.post("/v1/jobs", json=tiny_job(max_steps=40)).json()["id"])
    assert base["status"] == "succeeded", service.log()
    numbers = tmp_path / "numbers.jsonl"  # easy data unlike the base model's
    numbers.write_text("".join(json.dumps({"text": f"{n} {n + 1} {n + 2} " * 20}) + "\n" for n in range(100, 300)))
    settings = ["eval_split=0.1", "eval_steps=12", "max_steps=24", "seq_len=64", "batch_size=4", "learning_rate=0.002"]
    words = [word for setting in (*settings, "lora.save_merged=true") for word in ("--set", setting)]
    followed = service.command("submit", "--model", base["id"], "--data", str(numbers), "--lora", *words, "--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr + service.log()
    assert "of them trained" in followed.stdout
    assert followed.stdout.count(" held-out loss ") == 3  # two evaluations and the outcome
    job = json.loads(service.command("job", "@last", "--json").stdout)
    assert job["resolved_spec"]["lora"]["target_modules"] == "all-linear"

    # The held-out loss falls, in events, curves, checkpoints and the result alike.
    events = http.get(f"/v1/jobs/{job['id']}/events?limit=1000").json()["data"]
    eval_losses = {
        e["step"]: e["eval_loss"] for e in events if e["type"] == "progress" and e.get("eval_loss") is not None
    }
    assert {e["phase"] for e in events if e.get("eval_loss") is not None} == {"evaluating"}
    assert list(eval_losses) == [12, 24]
    assert eval_losses[24] < eval_losses[12]
    assert job["result"]["eval_loss"] == eval_losses[24]
    assert job["result"]["best_checkpoint"] == "best"
    curves = http.get(f"/v1/jobs/{job['id']}/metrics").json()
    assert {s: v for s, v in zip(curves["step"], curves["eval_loss"], strict=True) if v is not None} == eval_losses
    samples = [event for event in events if event["type"] == "sample"]
    assert [event["step"] for event in samples] == [12, 12, 12, 24, 24, 24]
    assert [event["text"] for event in samples[:3]] != [event["text"] for event in samples[3:]]

    folders: dict[str, Path] = {}
    for name, source in (("best", job), ("final", job), ("base", base)):
        folders[name] = tmp_path / name
        checkpoint = "final" if name == "base" else name
        words = ["download", source["id"], "--checkpoint", checkpoint, "-o", str(folders[name])]
        downloaded = service.command(*words)
        assert downloaded.returncode == 0, downloaded.stdout + downloaded.stderr
    manifest = http.get(f"/v1/jobs/{job['id']}/checkpoints/best").json()
    assert (manifest["format"], manifest["step"], manifest["base_model"]) == ("adapter", 24, f"{base['id']}/final")
    assert manifest["metrics"]["eval_loss"] == eval_losses[24]

    untouched: Any = AutoModelForCausalLM.from_pretrained(folders["base"])
    before = logits(untouched)
    adapted = logits(PeftModel.from_pretrained(untouched, str(folders["final"])))
    assert not torch.allclose(adapted, before, atol=1e-3)
    merged: Any = AutoModelForCausalLM.from_pretrained(folders["final"] / "merged")
    assert torch.allclose(logits(merged), adapted, atol=1e-5)
    config = json.loads((folders["final"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{base['id']}/final"

    # The adapter is trained further by a later job, and still belongs to the same base.
    words = ["--set", "lora.continue_adapter=true", "--set", "max_steps=2", "--set", "seq_len=64"]
    followed = service.command("submit", "--model", job["id"], "--data", str(numbers), *words, "--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr + service.log()
    later = json.loads(service.command("job", "@last", "--json").stdout)
    assert later["resolved_spec"]["lora"]["r"] == config["r"]
    manifest = http.get(f"/v1/jobs/{later['id']}/checkpoints/final").json()
    assert (manifest["format"], manifest["base_model"]) == ("adapter", f"{base['id']}/final")
