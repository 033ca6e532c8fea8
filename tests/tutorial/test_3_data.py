"""Lesson 3: bring your own data, and find mistakes before a job starts."""

import json
from pathlib import Path

import pytest

from tests.tutorial.conftest import SPEC
from zeta import Client
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.job.job import Job


def conversation(number: int) -> dict[str, object]:
    question = {"role": "user", "content": f"What is {number} plus 1?"}
    return {"messages": [question, {"role": "assistant", "content": str(number + 1)}]}


def write_rows(file: Path, rows: list[dict[str, object]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_fine_tune_an_adapter_on_conversations(client: Client, finished_job: Job, tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "chats.jsonl", [conversation(number) for number in range(40)])
    job = client.submit(
        {
            "model": {"job": finished_job.id},  # or a Hub id, or a local folder
            "dataset": chats,  # a local file, which the client uploads
            "lora": {"r": 4},
            "eval_split": 0.2,  # 20 % of the conversations are held out; the lowest loss on them is kept as "best"
            "max_steps": 4,
        }
    )
    job = client.wait(job.id)
    assert job.status == "succeeded"
    assert job.result is not None
    assert job.result.eval_loss is not None
    assert {"best", "final"} <= {checkpoint.name for checkpoint in client.checkpoints(job.id)}


@pytest.mark.extended
def test_validate_a_spec_and_its_rows_before_you_submit(client: Client, tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "chats.jsonl", [conversation(number) for number in range(10)])
    estimate = client.validate({**SPEC, "dataset": chats})
    assert (estimate.steps, estimate.parameters) == (4, 45_216)
    assert estimate.data is not None
    assert (estimate.data.rows, estimate.data.formats) == (10, ["messages"])


@pytest.mark.extended
def test_find_a_faulty_row_by_its_line(client: Client, tmp_path: Path) -> None:
    no_answer: dict[str, object] = {"messages": [{"role": "user", "content": "What is 1 plus 1?"}]}
    chats = write_rows(tmp_path / "chats.jsonl", [conversation(1), no_answer])
    with pytest.raises(InvalidRequest, match="line 2"):
        client.validate({**SPEC, "dataset": chats})


def test_find_every_invalid_field_at_once(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        client.submit({**SPEC, "learning_rate": -1, "num_train_epochs": 3})
    assert {detail.param: detail.suggestion for detail in refusal.value.details} == {
        "learning_rate": None,
        "num_train_epochs": "epochs",
    }
