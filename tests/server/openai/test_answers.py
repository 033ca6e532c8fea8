"""Requests for answers that need no worker: their parameters, and the models that a caller may use."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.harness.openai_client import openai_client
from tests.server.openai.conftest import BASE_MODEL
from tests.server.rows import Rows
from tests.server.server_process import API_KEY, ServerProcess, running_server, submit
from zeta_core.contract.spec.resolved_spec import ResolvedSpec

MESSAGES = [{"role": "user", "content": "Hi"}]


def refused(server: ServerProcess, path: str, **body: object) -> dict[str, str]:
    """The error of a request that is refused with a 400."""
    with server.http() as http:
        response = http.post(f"/openai/v1{path}", json={"model": BASE_MODEL, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("store", True),
        ("parallel_tool_calls", False),
        ("user", "me"),
        ("temperature", 2.5),
        ("top_p", -0.1),
        ("n", 17),
        ("seed", "one"),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("frequency_penalty", 3),
        ("top_logprobs", 2),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_a_parameter_that_cannot_take_effect_is_named(server: ServerProcess, parameter: str, value: object) -> None:
    error = refused(server, "/chat/completions", messages=MESSAGES, **{parameter: value})
    assert str(error["param"]).startswith(parameter)
    assert parameter in error["message"]


def test_both_names_of_the_maximum_length_are_refused_together(server: ServerProcess) -> None:
    error = refused(server, "/chat/completions", messages=MESSAGES, max_tokens=1, max_completion_tokens=1)
    assert "can't be combined" in error["message"]


def test_images_are_rejected(server: ServerProcess) -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    error = refused(server, "/chat/completions", messages=[{"role": "user", "content": [picture]}])
    assert "messages" in error["param"]


def test_an_architecture_without_weights_cannot_answer(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="architecture without weights"):
        client.completions.create(model=BASE_MODEL, prompt="Hi")


def test_a_reported_base_must_be_one_that_the_project_may_use(server: ServerProcess, rows: Rows) -> None:
    """A run that was taken over has reported a checkpoint of another project as the base of its job."""
    outcomes = list[int]()
    for project in ("default", "other"):
        base = rows.job(project=project)
        rows.attempt(base)
        rows.checkpoint(base, "final", 4, {"model.safetensors": ("weights", b"weights")})
        job = rows.job(reported=ResolvedSpec.model_validate({"model": {"job": base, "checkpoint": "final"}}))
        with server.http() as http:
            body = {"model": f"{job}/base", "messages": MESSAGES}
            response = http.post("/openai/v1/chat/completions", json=body)
        outcomes.append(response.status_code)
    assert outcomes == [503, 400], "no worker is connected, and the job of the other project is unknown"
    assert "not a job of this project" in response.json()["error"]["message"]


def test_a_base_can_answer_although_a_checkpoint_of_its_job_is_damaged(server: ServerProcess, rows: Rows) -> None:
    base = rows.job()
    job = rows.job(reported=ResolvedSpec.model_validate({"model": {"job": base, "checkpoint": "final"}}))
    for each in (base, job):
        rows.attempt(each)
        rows.checkpoint(each, "final", 4, {"model.safetensors": ("weights", b"weights")})
    (rows.settings.artifacts / "jobs" / job / "checkpoints" / "final" / "manifest.json").write_text("{")
    with server.http() as http:
        response = http.post("/openai/v1/chat/completions", json={"model": f"{job}/base", "messages": MESSAGES})
    assert "No connected worker" in response.json()["error"]["message"]


def test_a_job_without_a_checkpoint_is_not_found(server: ServerProcess, client: OpenAI) -> None:
    with server.http() as http:
        job = submit(http)["id"]
    with pytest.raises(openai.NotFoundError, match="no checkpoint yet"):
        client.completions.create(model=job, prompt="Hi")


def test_a_named_model_of_the_hub_needs_access_to_it(redis_url: str, tmp_path: Path) -> None:
    models = json.dumps({"published": "org/name"})
    with (
        running_server(tmp_path, redis_url, ZETA_OPENAI_MODELS=models) as server,  # ZETA_HUB is off by default
        openai_client(server.url, API_KEY) as client,
        pytest.raises(openai.BadRequestError, match="ZETA_HUB"),
    ):
        client.completions.create(model="published", prompt="Hi")


def test_without_a_worker_the_error_states_when_to_try_again(redis_url: str, tmp_path: Path) -> None:
    models = json.dumps({"published": "org/name"})
    with (
        running_server(tmp_path, redis_url, ZETA_OPENAI_MODELS=models, ZETA_HUB="on") as server,
        openai_client(server.url, API_KEY) as client,
        pytest.raises(openai.InternalServerError, match="No connected worker") as caught,
    ):
        client.completions.create(model="published", prompt="Hi")
    assert caught.value.status_code == 503
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 120
