"""Creating, listing and controlling fine-tuning jobs with the official client, on a server without workers."""

from typing import Any

import httpx
import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from server.openai.bodies import nested
from tests.harness.openai_client import strictly
from tests.server.openai.conftest import BASE_MODEL
from tests.server.openai.data import conversations, preferences, upload
from tests.server.rows import Rows
from zeta_core.contract.job.status import JobStatus, StatusReason

SMALL = "org/small"
MULTIPART_FORM: Any = {"headers": {"Content-Type": "multipart/form-data"}}


def spec_of(http: httpx.Client, job: FineTuningJob) -> dict[str, Any]:
    return http.get(f"/v1/jobs/{job.id}").json()["spec"]


def native(job: FineTuningJob) -> dict[str, Any]:
    """The fields that this service adds to OpenAI's."""
    assert job.model_extra is not None
    return job.model_extra["zeta"]


# --- Translation ------------------------------------------------------------------------------------------------------


def test_a_minimal_request_becomes_a_job_with_defaults(client: OpenAI, http: httpx.Client) -> None:
    file_id = upload(client)
    job = strictly(client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id))
    assert (job.model, job.training_file, job.validation_file) == (BASE_MODEL, file_id, None)
    assert (job.status, job.fine_tuned_model, job.result_files, job.error) == ("queued", None, [], None)
    assert job.organization_id == "default"
    assert spec_of(http, job)["dataset"] == {"file": file_id}
    assert strictly(client.fine_tuning.jobs.retrieve(job.id)).to_dict() == job.to_dict()


def test_every_parameter_takes_effect_and_is_shown_resolved(client: OpenAI, http: httpx.Client) -> None:
    training, validation = upload(client), upload(client, conversations(3, start=90))
    job = strictly(
        client.fine_tuning.jobs.create(
            model=SMALL,
            training_file=training,
            validation_file=validation,
            suffix="my-suffix",
            seed=7,
            metadata={"team": "a"},
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 12, "learning_rate_multiplier": 0.5}},
            },
            integrations=[{"type": "wandb", "wandb": {"project": "p", "name": "n", "tags": ["t"]}}],
            extra_body={"trainer": {"lr_scheduler": "linear", "checkpointing_steps": 5}},
        )
    )
    assert spec_of(http, job) == {
        "model": {"config": {"model_type": "llama", "max_position_embeddings": 64}},
        "dataset": {"file": training},
        "eval_dataset": {"file": validation},
        "method": "sft",
        "epochs": 2,
        "batch_size": 6,
        "gradient_accumulate_every": 2,
        "pack": False,
        "learning_rate": 1.5e-4,  # half of the default for a model that is trained from scratch
        "seed": 7,
        "entity_name": "my-suffix",
        "metadata": {"team": "a"},
        "report_to": ["wandb"],
        "wandb": {"project": "p", "name": "n", "tags": ["t"]},
        "lr_scheduler": "linear",
        "checkpointing_steps": 5,
    }
    shown = {"batch_size": 12, "learning_rate_multiplier": 0.5, "n_epochs": 2}
    assert job.hyperparameters.to_dict() == shown
    assert job.method is not None
    assert job.method.to_dict(exclude_none=True) == {"type": "supervised", "supervised": {"hyperparameters": shown}}
    assert (job.seed, job.metadata, job.validation_file) == (7, {"team": "a"}, validation)
    assert job.integrations is not None
    wandb = {"project": "p", "entity": None, "name": "n", "tags": ["t"]}
    assert job.integrations[0].to_dict() == {"type": "wandb", "wandb": wandb}
    assert native(job)["resolved_spec"]["lr_scheduler"] == "linear"


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_has_the_effect_of_the_same_fields_in_json(
    client: OpenAI, http: httpx.Client, content_type: str
) -> None:
    file_id = upload(client)
    fields = {
        "model": SMALL,
        "training_file": file_id,
        "metadata[team]": "a",
        "metadata[number]": "1",
        "seed": "7",
        "method[type]": "supervised",
        "method[supervised][hyperparameters][n_epochs]": "2",
        "method[supervised][hyperparameters][learning_rate_multiplier]": "0.5",
    }
    if content_type == "multipart/form-data":
        job: Any = client.post(
            "/fine_tuning/jobs", body=nested(list(fields.items())), cast_to=FineTuningJob, options=MULTIPART_FORM
        )
    else:
        response = http.post("/openai/v1/fine_tuning/jobs", data=fields)
        assert response.status_code == 200, response.text
        job = FineTuningJob.model_validate(response.json())
    assert (job.seed, job.metadata) == (7, {"team": "a", "number": "1"})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (2, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": "much"}, "seed is 'much'; it must be a whole number"),
        ({"metadata[team]": "a", "metadata": "b"}, "field 'metadata', which is given twice"),
        ({"metadata": "b", "metadata[team]": "a"}, "also given as a value"),
        ({"integrations[]": "wandb"}, "send lists in a JSON body"),
        ({"unknown[a]": "b"}, "unknown"),
    ],
)
def test_an_invalid_form_is_rejected(http: httpx.Client, fields: dict[str, str], message: str) -> None:
    response = http.post("/openai/v1/fine_tuning/jobs", data={"model": SMALL, "training_file": "file", **fields})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_auto_stands_for_the_default(client: OpenAI, http: httpx.Client) -> None:
    automatic: Any = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = strictly(client.fine_tuning.jobs.create(model=SMALL, training_file=upload(client), hyperparameters=automatic))
    assert spec_of(http, job).keys() == {"model", "dataset"}
    assert job.hyperparameters.to_dict() == {"batch_size": 32, "learning_rate_multiplier": 1.0, "n_epochs": 1}


def test_preference_optimization_has_its_own_hyperparameters(client: OpenAI, http: httpx.Client) -> None:
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "learning_rate_multiplier": 2.0}}}
    job = strictly(
        client.fine_tuning.jobs.create(model=SMALL, training_file=upload(client, preferences()), method=method)
    )
    spec = spec_of(http, job)
    assert (spec["method"], spec["dpo"], spec["learning_rate"]) == ("dpo", {"beta": 0.3}, 2e-6)
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.3


def test_a_fine_tuned_model_is_trained_further(client: OpenAI, http: httpx.Client, rows: Rows) -> None:
    base = rows.job()
    rows.attempt(base, to=JobStatus.SUCCEEDED)
    rows.checkpoint(base, "final", 4, {"model.safetensors": ("weights", b"weights")})
    name = client.fine_tuning.jobs.retrieve(base).fine_tuned_model
    assert name is not None
    job = client.fine_tuning.jobs.create(model=name, training_file=upload(client))
    assert spec_of(http, job)["model"] == {"job": base, "checkpoint": "final"}
    assert job.model == name


# --- Rejected requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"training_file": "file-abc"}, "training_file", r"client\.files\.create"),
        ({"validation_file": "file-abc"}, "validation_file", "does not exist"),
        ({"method": {"type": "reinforcement"}}, "method.type", "needs graders and is not supported"),
        ({"suffix": "s" * 65}, "suffix", "at most 64 characters"),
        ({"seed": -1}, "seed", "must be at least 0"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "must be 'auto', or at least 1"),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs", "is not a known field"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "at most 512 characters"),
        (
            {"method": {"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.1}}}},
            "method.dpo",
            "method.type is 'supervised'",
        ),
        ({"extra_body": {"trainer": {"lora": {"rank": 4}}}}, "trainer.lora.rank", "did you mean"),
        ({"extra_body": {"trainer": {"model": "org/name"}}}, "trainer.model", "and model both determine this"),
        ({"extra_body": {"trainer": {"dataset": {"path": "x"}}}}, "trainer.dataset", "and training_file both"),
        ({"extra_body": {"n_epochs": 3}}, "n_epochs", "is not a known field"),
    ],
)
def test_an_invalid_request_names_its_parameter(
    client: OpenAI, fields: dict[str, Any], param: str, message: str
) -> None:
    given: dict[str, Any] = {"model": SMALL, "training_file": "", **fields}
    given["training_file"] = given["training_file"] or upload(client)
    with pytest.raises(BadRequestError, match=message) as caught:
        client.fine_tuning.jobs.create(**given)
    assert caught.value.param == param, caught.value


@pytest.mark.parametrize(
    ("hyperparameters", "trainer", "param"),
    [
        ({"learning_rate_multiplier": 2.0}, {"learning_rate": 1e-4}, "trainer.learning_rate"),
        ({"n_epochs": 2}, {"max_steps": 5}, "trainer.max_steps"),
        ({"batch_size": 2}, {"gradient_accumulate_every": 5}, "trainer.gradient_accumulate_every"),
    ],
)
def test_a_parameter_and_a_field_of_the_trainer_cannot_contradict(
    client: OpenAI, hyperparameters: Any, trainer: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequestError, match="both determine this; remove one of them") as caught:
        client.fine_tuning.jobs.create(
            model=SMALL,
            training_file=upload(client),
            hyperparameters=hyperparameters,
            extra_body={"trainer": trainer},
        )
    assert (caught.value.param, caught.value.code) == (param, "conflicting_parameters")


def test_an_unknown_model_lists_the_existing_ones(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match=f"the existing base models are {BASE_MODEL}, {SMALL}") as caught:
        client.fine_tuning.jobs.create(model="gpt-4.1", training_file=upload(client))
    assert caught.value.code == "model_not_found"


def test_unsupported_requests_are_rejected_with_the_reason(client: OpenAI, rows: Rows) -> None:
    with pytest.raises(BadRequestError, match="Checkpoint permissions are not supported"):
        client.fine_tuning.checkpoints.permissions.create("ft:a:b::c", project_ids=["p"])
    with pytest.raises(BadRequestError, match="Graders are not supported"):
        client.fine_tuning.alpha.graders.validate(
            grader={"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"}
        )


def test_few_examples_are_a_warning(client: OpenAI) -> None:
    job = client.fine_tuning.jobs.create(model=SMALL, training_file=upload(client, conversations(9)))
    assert [warning["code"] for warning in native(job)["warnings"]] == ["few_examples"]
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert next((strictly(event).level, event.message) for event in events) == (
        "warn",
        "training_file has 9 examples; OpenAI requires at least 10, and few examples teach little. Add examples; 50 to "
        "100 are a good start.",
    )
    assert native(client.fine_tuning.jobs.create(model=SMALL, training_file=upload(client)))["warnings"] == []


# --- Retries ----------------------------------------------------------------------------------------------------------


def retry(client: OpenAI, count: int, **fields: Any) -> str:
    headers = {"x-stainless-retry-count": str(count)}
    return client.fine_tuning.jobs.create(model=SMALL, extra_headers=headers, **fields).id


def test_a_retry_of_a_lost_response_returns_the_same_job(client: OpenAI) -> None:
    fields = {"training_file": upload(client), "suffix": "once"}
    first = retry(client, 0, **fields)
    assert retry(client, 1, **fields) == retry(client, 2, **fields) == first
    assert retry(client, 1, **{**fields, "suffix": "other"}) != first, "the first attempt did not arrive"
    assert retry(client, 2, **{**fields, "suffix": "other"}) != first


def test_two_equal_jobs_can_be_created_on_purpose(client: OpenAI) -> None:
    fields = {"training_file": upload(client)}
    first, second = retry(client, 0, **fields), retry(client, 0, **fields)
    assert first != second
    assert retry(client, 1, **fields) == second


def test_an_idempotency_key_is_exact(client: OpenAI) -> None:
    file_id = upload(client)
    headers = {"Idempotency-Key": "mine"}
    jobs = [
        client.fine_tuning.jobs.create(model=SMALL, training_file=file_id, extra_headers=headers).id for _ in range(2)
    ]
    assert jobs[0] == jobs[1]


# --- Reading and controlling ------------------------------------------------------------------------------------------


def test_jobs_are_listed_in_pages_and_by_metadata(client: OpenAI, http: httpx.Client) -> None:
    file_id = upload(client)
    ids = [
        client.fine_tuning.jobs.create(model=SMALL, training_file=file_id, metadata={"list": "a", "n": str(n)}).id
        for n in range(3)
    ]
    unmarked = client.fine_tuning.jobs.create(model=SMALL, training_file=file_id).id
    listed = [strictly(job).id for job in client.fine_tuning.jobs.list(metadata={"list": "a"}, limit=2)]
    assert listed == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"list": "a", "n": "1"})] == [ids[1]]
    without = [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})]
    assert unmarked in without
    assert not set(ids) & set(without)
    page = client.fine_tuning.jobs.list(limit=1)
    assert (page.has_more, len(page.data)) == (True, 1)
    both = http.get("/openai/v1/fine_tuning/jobs?metadata=null&metadata[a]=b")
    assert both.status_code == 400
    with pytest.raises(BadRequestError):
        client.fine_tuning.jobs.list(after="ftjob-1")


def test_jobs_of_the_other_interface_are_listed_too(client: OpenAI, rows: Rows) -> None:
    job = strictly(client.fine_tuning.jobs.retrieve(rows.job()))
    assert (job.model, job.training_file) == ("llama", "builtin:python-docs")
    assert job.hyperparameters.learning_rate_multiplier is None


def test_a_waiting_job_is_paused_resumed_and_cancelled(client: OpenAI) -> None:
    job = client.fine_tuning.jobs.create(model=SMALL, training_file=upload(client))
    assert strictly(client.fine_tuning.jobs.pause(job.id)).status == "paused"
    assert strictly(client.fine_tuning.jobs.resume(job.id)).status == "queued"
    assert strictly(client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    with pytest.raises(ConflictError) as caught:
        client.fine_tuning.jobs.pause(job.id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(NotFoundError):
        client.fine_tuning.jobs.cancel("ftjob-1")


def test_the_status_of_a_running_job_is_shown(client: OpenAI, rows: Rows) -> None:
    job_id = rows.job()
    rows.attempt(job_id)
    rows.change(job_id, progress={"phase": "loading_data", "documents": 3})
    assert strictly(client.fine_tuning.jobs.retrieve(job_id)).status == "validating_files"
    rows.change(job_id, progress={"phase": "training", "step": 1, "total_steps": 9, "eta_seconds": 60})
    running = strictly(client.fine_tuning.jobs.retrieve(job_id))
    assert running.status == "running"
    assert running.estimated_finish is not None
    assert client.fine_tuning.jobs.pause(job_id).status == "pausing"


def test_a_failed_job_has_its_error(client: OpenAI, rows: Rows) -> None:
    job_id = rows.job()
    rows.attempt(job_id, to=JobStatus.FAILED, reason=StatusReason.INVALID_DATA)
    rows.change(job_id, error={"code": "invalid_data", "message": "train.jsonl, line 3 is empty.", "hint": "Fix it."})
    job = strictly(client.fine_tuning.jobs.retrieve(job_id))
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.to_dict() == {
        "code": "invalid_data",
        "message": "train.jsonl, line 3 is empty. Fix it.",
        "param": "training_file",
    }


def test_events_are_listed_newest_first(client: OpenAI, rows: Rows) -> None:
    job_id = rows.job()
    progress = [
        {"phase": "training", "step": 1, "total_steps": 2, "loss": 2.0, "token_accuracy": 0.25, "learning_rate": 0.1},
        {"phase": "evaluating", "step": 1, "total_steps": 2, "eval_loss": 1.5, "eval_token_accuracy": 0.5},
    ]
    rows.attempt(job_id, progress=progress, to=JobStatus.SUCCEEDED)
    events = [strictly(event) for event in client.fine_tuning.jobs.list_events(job_id, limit=1)]
    assert events[-1].message == "The job is queued."
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics == [
        {
            "step": 1,
            "total_steps": 2,
            "valid_loss": 1.5,
            "full_valid_loss": 1.5,
            "valid_mean_token_accuracy": 0.5,
            "full_valid_mean_token_accuracy": 0.5,
        },
        {"step": 1, "total_steps": 2, "train_loss": 2.0, "train_mean_token_accuracy": 0.25, "learning_rate": 0.1},
    ]
    with pytest.raises(BadRequestError, match="is not the id of an event"):
        client.fine_tuning.jobs.list_events(job_id, after="ftevent-1")


def test_checkpoints_have_the_metrics_of_their_step(client: OpenAI, rows: Rows) -> None:
    job_id = rows.job()
    progress = [{"phase": "training", "step": step, "loss": 3.0 - step, "token_accuracy": step / 4} for step in (1, 2)]
    rows.attempt(job_id, progress=[*progress, {"phase": "evaluating", "step": 2, "eval_loss": 1.5}])
    for name, step in (("step-1", 1), ("step-2", 2), ("final", 2)):
        rows.checkpoint(job_id, name, step, {"model.safetensors": ("weights", b"weights")})
    found = [strictly(checkpoint) for checkpoint in client.fine_tuning.jobs.checkpoints.list(job_id, limit=1)]
    assert [checkpoint.step_number for checkpoint in found] == [2, 2, 1]
    assert [checkpoint.fine_tuned_model_checkpoint.rpartition(":")[2] for checkpoint in found] == [
        "ckpt-step-2",
        job_id.removeprefix("job_"),
        "ckpt-step-1",
    ]
    assert found[0].metrics.to_dict() == {
        "step": 2.0,
        "train_loss": 1.0,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 1.5,
        "valid_mean_token_accuracy": None,
        "full_valid_loss": 1.5,
        "full_valid_mean_token_accuracy": None,
    }
    with pytest.raises(BadRequestError, match="is not the id of a checkpoint"):
        client.fine_tuning.jobs.checkpoints.list(job_id, after="x")
