"""Training on real conversations and preferences with the whole service."""

import json
import math
from typing import Any

import httpx
import pytest

from tests.end_to_end.real_conversations import as_lines, real_conversations
from tests.end_to_end.specs import TINY_LLAMA, tiny_job
from tests.harness.service import Service, wait_for_end

MODEL = {"config": {**TINY_LLAMA, "max_position_embeddings": 512}}


def upload(http: httpx.Client, name: str, content: bytes) -> str:
    response = http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "dataset"})
    assert response.status_code == 201, response.text
    return response.json()["id"]


def run(http: httpx.Client, service: Service, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a job that must succeed, and return it with its events."""
    response = http.post("/v1/jobs", json=tiny_job(seq_len=512, max_steps=8, **fields))
    assert response.status_code == 201, response.text
    job = wait_for_end(http, response.json()["id"])
    assert job["status"] == "succeeded", service.log()
    return job, http.get(f"/v1/jobs/{job['id']}/events?limit=1000").json()["data"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_model_learns_from_conversations_and_then_from_preferences(http: httpx.Client, service: Service) -> None:
    conversations = real_conversations(120)
    rows = [{"turns": turns} for turns in conversations]
    chat = {"file": upload(http, "chat.jsonl", as_lines(rows)), "columns": {"messages": "turns"}}

    broken = upload(http, "broken.jsonl", as_lines([*rows[:2], {"turns": [{"role": "robot", "content": "x"}]}]))
    failed = wait_for_end(http, http.post("/v1/jobs", json=tiny_job(dataset={**chat, "file": broken})).json()["id"])
    assert (failed["status"], failed["status_reason"]) == ("failed", "invalid_data")
    assert "broken.jsonl, line 3: 'turns': message 1 has the role 'robot'" in failed["error"]["message"]

    job, events = run(http, service, model=MODEL, dataset=chat, eval_split=0.1, eval_steps=4)
    assert job["resolved_spec"]["train_on"] == "assistant"
    [data] = [event["data"] for event in events if event["type"] == "log" and event.get("data")]
    assert data == job["resolved_spec"]["data_report"]
    assert (data["formats"], data["documents"], data["duplicates"]) == (["messages"], 108, 0)
    assert 0.1 < data["supervised_share"] < 0.7
    assert data["lengths"]["max"] >= data["lengths"]["median"] > 50
    read = [event for event in events if event["type"] == "progress" and event.get("share") is not None]
    assert (read[-1]["phase"], read[-1]["share"], read[-1]["documents"]) == ("loading_data", 1.0, 120)
    assert "default_chat_template" in {event.get("code") for event in events if event["type"] == "warning"}
    eval_losses = [event["eval_loss"] for event in events if event.get("eval_loss") is not None]
    assert eval_losses[-1] < eval_losses[0]
    template = http.get(f"/v1/jobs/{job['id']}/checkpoints/final/files/chat_template.jinja")
    assert "<|im_start|>" in template.text

    # The real next turn is preferred to a turn of another conversation.
    pairs = [
        {"prompt": turns[:3], "chosen": turns[3:], "rejected": other[3:]}
        for turns, other in zip(conversations[:8], conversations[8:16], strict=True)
    ]
    preferences = [
        {"file": upload(http, f"pairs-{weight}.jsonl", as_lines(some)), "format": "preference", "weight": weight}
        for weight, some in ((1, pairs[:4]), (3, pairs[4:]))
    ]
    method = {"method": "dpo", "dpo": {"beta": 0.5}, "learning_rate": 0.01}
    preferred, events = run(
        http, service, **{"model": {"job": job["id"]}, "dataset": preferences, "lora": {"r": 8}, **method}
    )
    rewards = [event["rewards"] for event in events if event.get("rewards")]
    assert rewards[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert preferred["resolved_spec"]["dpo"] == {"beta": 0.5}
    seen = preferred["resolved_spec"]["data_report"]["sources"]
    assert [(source["name"], source["seen_share"]) for source in seen] == [
        ("pairs-1.jsonl", 0.25),
        ("pairs-3.jsonl", 0.75),
    ]
    losses = [event["loss"] for event in events if event["type"] == "progress" and event.get("loss") is not None]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert rewards[-1]["margin"] > 0, json.dumps(rewards)
