"""Naming base models: ``/v1/models``, `zeta models`, and the jobs of a named model."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI

from tests.server.openai.data import upload
from tests.server.server_process import API_KEY, SPEC, ServerProcess, error_of
from zeta.client import Client
from zeta_core.contract.errors import Conflict, InvalidRequest, NotFound

MODEL = SPEC["model"]


@pytest.fixture
def zeta(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url, API_KEY) as client:
        yield client


def test_a_named_model_is_trained_with_its_defaults(zeta: Client, client: OpenAI, http: httpx.Client) -> None:
    defaults = {"epochs": 5, "learning_rate": 0.001, "lora": {"r": 4}}
    named = zeta.models.add("gpt-4.1-mini", MODEL, defaults)
    assert (named.name, named.model, named.defaults, named.origin) == ("gpt-4.1-mini", MODEL, defaults, "project")
    assert "gpt-4.1-mini" in [model.id for model in client.models.list()]
    job = client.fine_tuning.jobs.create(
        model="gpt-4.1-mini",
        training_file=upload(client),
        hyperparameters={"learning_rate_multiplier": 2},
        extra_body={"trainer": {"max_steps": 7, "lora": {"lora_alpha": 8}}},
    )
    spec = http.get(f"/v1/jobs/{job.id}").json()["spec"]
    assert (spec["lora"], spec["max_steps"], spec["learning_rate"]) == ({"r": 4, "lora_alpha": 8}, 7, 0.002)
    assert "epochs" not in spec
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (None, 2)


def test_names_are_listed_and_removed(zeta: Client, client: OpenAI) -> None:
    zeta.models.add("team/own", MODEL)
    listed = {named.name: named.origin for named in zeta.models.list()}
    assert listed["team/own"] == "project"
    assert listed["org/small"] == "settings"
    with pytest.raises(Conflict, match="exists; remove it first with `zeta models remove team/own`"):
        zeta.models.add("team/own", MODEL)
    assert zeta.models.remove("team/own").id == "team/own"
    with pytest.raises(NotFoundError):
        client.models.retrieve("team/own")
    with pytest.raises(NotFound, match="It is set by ZETA_OPENAI_MODELS"):
        zeta.models.remove("org/small")


def test_another_project_does_not_see_a_name(server: ServerProcess, zeta: Client, http: httpx.Client) -> None:
    zeta.models.add("only-here", MODEL)
    http.post("/v1/projects", json={"name": "elsewhere"})
    listed = http.get("/v1/models", headers={"Zeta-Project": "elsewhere"}).json()["data"]
    assert "only-here" not in [named["name"] for named in listed]
    assert http.delete("/v1/models/only-here", headers={"Zeta-Project": "elsewhere"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "ft:a:b::c", "model": MODEL}, "name"),
        ({"name": "job_1", "model": MODEL}, "name"),
        ({"name": "a b", "model": MODEL}, "name"),
        ({"name": "a", "model": {"path": "/etc"}}, "model"),
        ({"name": "a", "model": MODEL, "defaults": {"lora": {"rank": 3}}}, "defaults.lora.rank"),
        ({"name": "a", "model": MODEL, "defaults": {"dataset": {"path": "x"}}}, "defaults.dataset"),
        ({"name": "a", "model": {"job": "job_00000000000000000000", "checkpoint": "final"}}, "model.job"),
        ({"name": "a", "model": "org/name"}, "model"),
        ({"name": "a"}, "model"),
    ],
)
def test_an_invalid_name_names_its_field(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/models", json=body)
    assert answer.status_code == 422
    assert error_of(answer)["param"] == param, answer.text


def test_the_client_reports_an_invalid_name(zeta: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"defaults\.epochs is -1"):
        zeta.models.add("a", MODEL, {"epochs": -1})
