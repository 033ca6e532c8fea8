"""Models under ``/openai/v1/models``, read with the official client."""

import httpx
import pytest
from openai import AuthenticationError, BadRequestError, ConflictError, NotFoundError, OpenAI, PermissionDeniedError

from tests.harness.openai_client import openai_client, strictly
from tests.server.openai.conftest import BASE_MODEL
from tests.server.rows import Rows
from tests.server.server_process import ServerProcess
from zeta_core.contract.job.status import JobStatus


@pytest.fixture(scope="module")
def job_id(rows: Rows) -> str:
    """A job that has succeeded, with two checkpoints."""
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    rows.change(job_id, entity_name="my suffix")
    rows.checkpoint(job_id, "step-2", 2, {"model.safetensors": ("weights", b"weights")})
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", b"weights")})
    return job_id


def test_the_list_contains_base_models_and_fine_tuned_models(client: OpenAI, job_id: str) -> None:
    models = [strictly(model) for model in client.models.list()]
    names = [model.id for model in models]
    assert names[:2] == [BASE_MODEL, "org/small"]
    assert f"ft:llama:default:my-suffix:{job_id.removeprefix('job_')}" in names


def test_a_fine_tuned_model_has_several_names(client: OpenAI, job_id: str) -> None:
    full = f"ft:llama:default:my-suffix:{job_id.removeprefix('job_')}"
    for name, canonical in {
        full: full,
        job_id: full,
        f"{job_id}/final": full,
        f"{job_id}/step-2": f"{full}:ckpt-step-2",
        f"{full}:ckpt-step-2": f"{full}:ckpt-step-2",
        BASE_MODEL: BASE_MODEL,
        "org/small": "org/small",
    }.items():
        assert strictly(client.models.retrieve(name)).id == canonical


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4o",
        "ft:llama:default:my-suffix:nothing",
        "ft:other:default:my-suffix:{id}",
        "ft:llama:default:my-suffix:{id}:ckpt-step-3",
        "job_{id}/step-3",
        "job_{id}/../final",
        "job_0000000000000000000000",
        "\x1b[31m",
    ],
)
def test_an_unknown_model_is_not_found(client: OpenAI, job_id: str, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve(name.replace("{id}", job_id.removeprefix("job_")))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert f"the existing base models are {BASE_MODEL}, org/small" in caught.value.message
    assert "`zeta models add NAME SOURCE`" in caught.value.message
    assert "\x1b" not in caught.value.message


def test_a_job_without_a_checkpoint_is_not_a_model_yet(client: OpenAI, rows: Rows) -> None:
    job_id = rows.job()
    with pytest.raises(NotFoundError, match="is queued and has no checkpoint yet"):
        client.models.retrieve(job_id)


def test_the_job_of_another_project_is_not_found(client: OpenAI, rows: Rows) -> None:
    job_id = rows.job(project="other")
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", b"weights")})
    for name in (job_id, f"{job_id}/final", f"ft:llama:other::{job_id.removeprefix('job_')}"):
        with pytest.raises(NotFoundError):
            client.models.retrieve(name)
    assert all(job_id.removeprefix("job_") not in model.id for model in client.models.list())


def test_a_fine_tuned_model_is_deleted_with_its_job(client: OpenAI, rows: Rows) -> None:
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.SUCCEEDED)
    rows.checkpoint(job_id, "step-2", 2, {"model.safetensors": ("weights", b"weights")})
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", b"weights")})
    full = f"ft:llama:default::{job_id.removeprefix('job_')}"
    with pytest.raises(BadRequestError, match="delete the whole fine-tuned model"):
        client.models.delete(f"{full}:ckpt-step-2")
    assert strictly(client.models.delete(full)).deleted
    with pytest.raises(NotFoundError):
        client.models.retrieve(full)
    assert not rows.has_job(job_id)


def test_models_that_cannot_be_deleted_are_reported(client: OpenAI, rows: Rows) -> None:
    with pytest.raises(PermissionDeniedError, match="is the name of a base model"):
        client.models.delete(BASE_MODEL)
    job_id = rows.job()
    rows.attempt(job_id)
    rows.checkpoint(job_id, "final", 4, {"model.safetensors": ("weights", b"weights")})
    with pytest.raises(ConflictError) as caught:
        client.models.delete(job_id)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_errors_have_exactly_the_fields_of_openai(server: ServerProcess, http: httpx.Client) -> None:
    with server.http("wrong") as stranger:
        for response, status, code in (
            (stranger.get("/openai/v1/models"), 401, "invalid_api_key"),
            (http.get("/openai/v1/models/none"), 404, "model_not_found"),
            (http.get("/openai/v1/models", params={"limit": 1}), 400, "unknown_parameter"),
        ):
            error = response.json()["error"]
            assert list(error) == ["message", "type", "param", "code"]
            assert (response.status_code, error["type"], error["code"]) == (status, "invalid_request_error", code)
            assert response.headers["x-request-id"]
    with openai_client(server.url, "wrong") as client, pytest.raises(AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
