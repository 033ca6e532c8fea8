"""An evaluation runs on a worker, and measures what the training itself measured."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.chat_jobs import MODEL, run
from tests.end_to_end.specs import tiny_job
from tests.harness.service import Service, processes_of_job, running_service, wait_for_end
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
RIVERS = ("Rhine", "Elbe", "Danube", "Oder", "Main", "Spree", "Isar", "Neckar")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("evaluations")) as running:
        yield running


def conversations(rivers: Sequence[str] = RIVERS) -> bytes:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Which river has number {number}?"},
                {"role": "assistant", "content": f"The {river}, of course."},
            ]
        }
        for number, river in enumerate(rivers)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(service: Service, content: bytes, name: str = "held_out.jsonl") -> str:
    with service.http() as http:
        sent = http.post("/v1/files", files={"file": (name, content)}, data={"purpose": "dataset"})
    return sent.raise_for_status().json()["id"]


@pytest.fixture(scope="module")
def trained(service: Service) -> str:
    """A job that was trained on the conversations, and evaluated on them."""
    base = run(service, tiny_job(model=MODEL, max_steps=2, learning_rate=1e-9, seq_len=128))
    file_id = upload(service, conversations())
    return run(
        service,
        tiny_job(
            model={"job": base, "checkpoint": "final"},
            dataset={"file": file_id},
            eval_dataset={"file": file_id},
            eval_steps=20,
            max_steps=40,
            seq_len=128,
        ),
    )


def evaluate(service: Service, job: str, file_id: str, **fields: Any) -> dict[str, Any]:
    """The ended evaluation."""
    with service.http() as http:
        sent = http.post(f"/v1/jobs/{job}/evaluations", json={"file": file_id, **fields})
        assert sent.status_code == 201, sent.text
        return wait_for_end(http, sent.json()["id"])


def test_the_loss_is_that_of_the_evaluation_in_the_training(service: Service, trained: str) -> None:
    with service.http() as http:
        events = http.get(f"/v1/jobs/{trained}/events", params={"limit": 1000}).json()["data"]
        job = http.get(f"/v1/jobs/{trained}").json()
    [last] = [event for event in events if event.get("eval_loss") is not None and event["step"] == 40]
    done = evaluate(service, trained, upload(service, conversations()))
    assert done["status"] == "succeeded", done["error"]
    found = done["result"]["evaluation"]
    assert found["checkpoint"]["loss"] == pytest.approx(job["result"]["eval_loss"], abs=1e-6)
    assert found["checkpoint"]["perplexity"] == pytest.approx(last["perplexity"], rel=1e-5)
    assert found["checkpoint"]["token_accuracy"] == pytest.approx(last["eval_token_accuracy"], abs=1e-6)
    assert (found["num_documents"], found["base"], found["comparison"]) == (len(RIVERS), None, None)
    assert done["result"]["eval_loss"] == found["checkpoint"]["loss"]


def test_the_command_compares_the_checkpoint_with_its_base(service: Service, trained: str, tmp_path: Path) -> None:
    file = tmp_path / "rivers.jsonl"
    file.write_bytes(conversations(RIVERS[:6]))
    command = service.command("eval", trained, str(file), "--base")
    assert command.returncode == 0, command.stderr
    assert "6 documents" in command.stdout
    assert "The checkpoint is better." in command.stdout
    with service.http() as http:
        [newest] = http.get("/v1/jobs", params={"kind": "evaluation", "limit": 1}).json()["data"]
    found = newest["result"]["evaluation"]
    assert found["checkpoint"]["loss"] < found["base"]["loss"]
    difference = found["checkpoint"]["loss"] - found["base"]["loss"]
    assert found["comparison"]["difference"] == pytest.approx(difference, abs=1e-9)
    assert found["comparison"]["low"] <= difference <= found["comparison"]["high"] < 0

    downloaded = service.command("download", newest["id"], "-o", str(tmp_path / "results"))
    assert downloaded.returncode == 0, downloaded.stderr
    lines = [json.loads(line) for line in (tmp_path / "results" / "documents.jsonl").read_text().splitlines()]
    assert [line["location"] for line in lines] == [f"rivers.jsonl, line {row + 1}" for row in range(6)]
    assert sum(line["num_tokens"] for line in lines) == found["num_tokens"]
    total = sum(line["loss"] * line["num_tokens"] for line in lines)
    assert total / found["num_tokens"] == pytest.approx(found["checkpoint"]["loss"], abs=1e-9)
    assert all(line["loss"] < line["base_loss"] for line in lines)


def test_a_faulty_row_fails_the_evaluation_with_its_location(service: Service, trained: str) -> None:
    content = conversations() + b'{"messages": [{"role": "user"}]}\n'
    done = evaluate(service, trained, upload(service, content, "faulty.jsonl"))
    assert done["status"] == "failed"
    assert f"faulty.jsonl, line {len(RIVERS) + 1}" in done["error"]["message"]


def test_an_adapter_is_compared_with_the_model_that_it_adapts(service: Service, trained: str) -> None:
    file_id = upload(service, conversations())
    adapted = run(
        service,
        tiny_job(
            model={"job": trained, "checkpoint": "final"},
            dataset={"file": upload(service, conversations(["Weser", *RIVERS[1:]]))},
            eval_dataset={"file": file_id},
            lora={"r": 4},
            seq_len=128,
        ),
    )
    with service.http() as http:
        expected = http.get(f"/v1/jobs/{adapted}").json()["result"]["eval_loss"]
    alone = evaluate(service, trained, file_id)["result"]["evaluation"]["checkpoint"]
    found = evaluate(service, adapted, file_id, base=True)["result"]["evaluation"]
    assert found["base"] == alone
    assert found["checkpoint"]["loss"] == pytest.approx(expected, abs=1e-5)  # the adapter is merged here


def test_a_killed_evaluation_starts_again(service: Service, trained: str) -> None:
    with service.http() as http:
        file_id = upload(service, conversations(RIVERS * 400))
        job = http.post(f"/v1/jobs/{trained}/evaluations", json={"file": file_id}).raise_for_status().json()["id"]

        def is_evaluating() -> bool:
            return (http.get(f"/v1/jobs/{job}").json()["progress"] or {}).get("phase") == "evaluating"

        wait_until(is_evaluating, 120, "the evaluation to begin")
        for process_id in processes_of_job(job):
            os.kill(process_id, signal.SIGKILL)
        done = wait_for_end(http, job)
    assert (done["status"], len(done["attempts"])) == ("succeeded", 2)
    assert done["result"]["evaluation"]["num_documents"] == 400 * len(RIVERS)
