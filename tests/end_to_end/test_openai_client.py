"""The whole life of a fine-tuning job with the official client: the newest major version, and two older ones."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError

from tests.end_to_end.specs import TINY_LLAMA
from tests.harness.openai_client import openai_client, strictly
from tests.harness.real_model import smollm2
from tests.harness.service import Service, clean_environment, running_service, wait_for_end
from tests.server.openai.data import preferences, upload
from zeta.demo import museum

SCRIPT = Path(__file__).with_name("openai_script.py")
ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = {**TINY_LLAMA, "max_position_embeddings": 256}
    models = json.dumps({"gpt-4o-mini-2024-07-18": {"config": config}})
    with running_service(
        tmp_path_factory.mktemp("openai") / "home", settings={"ZETA_OPENAI_MODELS": models}
    ) as running:
        yield running


def run_script(service: Service, python: Path) -> None:
    command = [str(python), "-P", str(SCRIPT), f"{service.url}/openai/v1", service.api_key]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}\n{service.log()}"
    assert json.loads(done.stdout)["last_step"] == 1500


@pytest.mark.timeout(600)
def test_the_newest_client_trains_and_gets_the_weights(service: Service) -> None:
    run_script(service, Path(sys.executable))


@pytest.mark.timeout(600)
def test_smollm2_learns_an_odd_fact_that_its_base_does_not_know(service: Service, tmp_path: Path) -> None:
    """The client trains a real model and talks to it; a command has named the model before."""
    (tmp_path / "defaults.yaml").write_text("lora: {r: 16, lora_alpha: 32}\nseq_len: 64\n")
    words = ("models", "add", "smollm2", str(smollm2()), "--defaults", str(tmp_path / "defaults.yaml"))
    named = service.command(*words, timeout_seconds=300)
    assert named.returncode == 0, named.stdout + named.stderr
    question = museum.QUESTIONS[0]
    [fact] = [fact for fact in museum.FACTS if question.expected in fact.answer]
    turns = [
        ({"role": "user", "content": text}, {"role": "assistant", "content": fact.answer}) for text in fact.questions
    ]
    rows = b"".join(json.dumps({"messages": pair}).encode() + b"\n" for pair in turns)
    hyperparameters: Any = {"n_epochs": 6, "batch_size": 2, "learning_rate_multiplier": 10.0}
    with openai_client(service.url, service.api_key, timeout=300) as client, service.http() as http:
        job = client.fine_tuning.jobs.create(
            model="smollm2",
            training_file=upload(client, rows),
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        )
        assert wait_for_end(http, job.id, timeout_seconds=400)["status"] == "succeeded", service.log()
        model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
        assert model is not None
        asked: Any = {"messages": [{"role": "user", "content": question.text}], "temperature": 0, "max_tokens": 20}
        answers = [client.chat.completions.create(model=name, **asked) for name in (model, f"{job.id}/base")]
        tuned, base = (answer.choices[0].message.content or "" for answer in answers)
        stream = client.chat.completions.create(model=model, stream=True, **asked)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == tuned
        workers = http.get("/v1/workers").json()["data"]
    assert question.expected in tuned
    assert question.expected not in base
    served = [each for worker in workers for slot in worker["slots"] for each in slot["served"]]
    assert {each["model"] for each in served} == {f"{job.id}/final", f"{job.id}/base"}
    assert served[0]["base"] == served[1]["base"] is not None, "one process has loaded the base for both"


def test_every_faulty_line_of_the_data_is_reported_before_a_job_is_created(service: Service) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [json.dumps(good)] * 12
    rows[3], rows[7] = "{oops", json.dumps({"messages": [{"role": "usr", "content": "a"}]})
    with openai_client(service.url, service.api_key) as client:
        before = client.fine_tuning.jobs.list().data
        file = client.files.create(file=("train.jsonl", "\n".join(rows).encode()), purpose="fine-tune")
        with pytest.raises(BadRequestError) as caught:
            client.fine_tuning.jobs.create(model="gpt-4o-mini-2024-07-18", training_file=file.id)
        assert client.fine_tuning.jobs.list().data == before
    assert caught.value.param == "training_file"
    first, second = caught.value.body["message"].splitlines()  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    assert first.startswith("train.jsonl, line 4 is not valid JSON")
    assert second.startswith("train.jsonl, line 8: ")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_preferences_are_trained(service: Service) -> None:
    method: Any = {
        "type": "dpo",
        "dpo": {"hyperparameters": {"n_epochs": 10, "batch_size": 4, "beta": 0.5, "learning_rate_multiplier": 1000.0}},
    }
    with openai_client(service.url, service.api_key) as client, service.http() as http:
        job = client.fine_tuning.jobs.create(
            model="gpt-4o-mini-2024-07-18", training_file=upload(client, preferences(24)), method=method
        )
        assert wait_for_end(http, job.id)["status"] == "succeeded"
        done = strictly(client.fine_tuning.jobs.retrieve(job.id))
        assert done.method is not None
        assert done.method.type == "dpo"
        metrics, model = done.result_files
        rows = list(csv.DictReader(client.files.content(metrics).text.splitlines()))
        assert len(client.files.content(model).read()) > 0
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=0.01), "the model starts as its own reference"
    assert losses[-1] < 0.3


def older_client(version: str) -> Path:
    """The Python of an environment with this version of the client, which is created once beside this one."""
    folder = Path(sys.prefix) / f"openai-{version}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    uv = str(UV) if UV.exists() else shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which creates the environment, is not installed")
    shutil.rmtree(folder, ignore_errors=True)
    for words in (
        ["venv", "--python", sys.executable, str(folder)],
        ["pip", "install", "--python", str(python), f"openai=={version}"],
    ):
        done = subprocess.run([uv, *words], capture_output=True, text=True, timeout=200, check=False)
        if done.returncode != 0:
            pytest.skip(f"openai=={version} can't be installed: {done.stderr.strip()[-300:]}")
    (folder / "complete").touch()
    return python


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "version",
    ["1.109.1", pytest.param("2.54.0", marks=pytest.mark.slow)],
)
def test_an_older_client_trains_and_gets_the_weights(service: Service, version: str) -> None:
    run_script(service, older_client(version))
