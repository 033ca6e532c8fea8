"""Importing exported jobs of OpenAI with `zeta import openai` and `Client.import_openai_job`."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.service import ZETA, clean_environment
from tests.server.openai.conftest import BASE_MODEL
from tests.server.openai.data import conversations, preferences
from tests.server.server_process import API_KEY, SPEC, ServerProcess
from zeta.client import Client
from zeta_core.contract.errors import InvalidRequest, NotFound

HYPERPARAMETERS = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.5}

# The object of a supervised job, with the fields of OpenAI's API.
EXPORT: dict[str, Any] = {
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "model": BASE_MODEL,
    "created_at": 1721764800,
    "finished_at": 1721768400,
    "fine_tuned_model": f"ft:{BASE_MODEL}:my-org:support:7q8mpxmy",
    "organization_id": "org-123",
    "result_files": ["file-result"],
    "status": "succeeded",
    "validation_file": None,
    "training_file": "file-abc123",
    "hyperparameters": HYPERPARAMETERS,
    "trained_tokens": 5768,
    "error": {},
    "integrations": [
        {"type": "wandb", "wandb": {"project": "p", "entity": None, "name": None, "tags": ["t"], "run_id": "r1"}}
    ],
    "seed": 0,
    "estimated_finish": 0,
    "metadata": {"team": "a"},
    "usage_metrics": None,
    "shared_with_openai": False,
    "eval_id": "eval-1",
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {**HYPERPARAMETERS, "prompt_loss_weight": 0.01}},
        "dpo": None,
        "reinforcement": None,
    },
}
NOT_IMPORTED = {
    "organization_id": "org-123",
    "eval_id": "eval-1",
    "hyperparameters.prompt_loss_weight": 0.01,
    "integrations.0.wandb.run_id": "r1",
}


@pytest.fixture
def zeta(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url, API_KEY) as client:
        yield client


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_bytes(conversations())
    return file


def import_command(server: ServerProcess, folder: Path, export: Any, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``zeta import openai JOB.json WORDS``."""
    file = folder / "job.json"
    file.write_text(json.dumps(export))
    environment = {**clean_environment(), "ZETA_URL": server.url, "ZETA_API_KEY": API_KEY, "ZETA_HOME": str(folder)}
    command = [str(ZETA), "import", "openai", str(file), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_exported_job_and_its_file_become_a_job(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    done = import_command(server, tmp_path, EXPORT, "--data", str(data), "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    spec = printed["job"]["spec"]
    file_id = spec.pop("dataset")["file"]
    assert spec == {
        "model": SPEC["model"],
        "method": "sft",
        "epochs": 3,
        "batch_size": 2,
        "gradient_accumulate_every": 1,
        "pack": False,
        "learning_rate": pytest.approx(4.5e-4),  # 1.5 times the default for a model that is trained from scratch
        "seed": 0,
        "entity_name": "support",
        "metadata": {"team": "a"},
        "report_to": ["wandb"],
        "wandb": {"project": "p", "tags": ["t"]},
    }
    with server.http() as http:
        assert http.get(f"/v1/files/{file_id}/content").content == data.read_bytes()
    assert printed["not_imported"] == NOT_IMPORTED


def test_settings_without_an_equivalent_are_printed(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    export = {**EXPORT, "validation_file": "file-validation"}
    done = import_command(server, tmp_path, export, "--data", str(data))
    assert done.returncode == 0, done.stderr
    heading, *listed, last = done.stdout.splitlines()
    assert heading == "These settings of the exported job have no equivalent here, or need a file:"
    assert sorted(listed) == [
        "  eval_id: 'eval-1'",
        "  hyperparameters.prompt_loss_weight: 0.01",
        "  integrations.0.wandb.run_id: 'r1'",
        "  organization_id: 'org-123'",
        "  validation_file: 'file-validation'; name its file with --validation-data FILE",
    ]
    assert last.startswith("job_")
    assert " is queued. Follow it: zeta wait job_" in last


def test_a_validation_file_and_a_preference_job_are_imported(zeta: Client, tmp_path: Path, data: Path) -> None:
    data.write_bytes(preferences())
    validation = tmp_path / "validation.jsonl"
    validation.write_bytes(preferences(3))
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "batch_size": "auto", "n_epochs": 2}}}
    export = {**EXPORT, "method": method, "hyperparameters": None, "validation_file": "file-v", "integrations": []}
    job, not_imported = zeta.import_openai_job(export, data, validation_data=validation)
    assert (job.spec["method"], job.spec["dpo"], job.spec["epochs"]) == ("dpo", {"beta": 0.3}, 2)
    assert job.spec["eval_dataset"] == {"file": zeta.upload(validation).id}
    assert not_imported == {"organization_id": "org-123", "eval_id": "eval-1"}


def test_an_old_export_has_only_hyperparameters(zeta: Client, data: Path) -> None:
    names = ("object", "id", "model", "training_file", "hyperparameters")
    job, not_imported = zeta.import_openai_job({name: EXPORT[name] for name in names}, data)
    assert (job.spec["epochs"], job.spec["batch_size"], not_imported) == (3, 2, {})


def test_a_job_exported_by_this_service_needs_no_file(zeta: Client, data: Path, http: httpx.Client) -> None:
    job, _ = zeta.import_openai_job(EXPORT, data)
    exported = http.get(f"/openai/v1/fine_tuning/jobs/{job.id}").json()
    again, not_imported = zeta.import_openai_job(exported)
    assert again.id != job.id
    assert again.spec["dataset"] == job.spec["dataset"]
    assert again.spec["learning_rate"] == job.spec["learning_rate"]
    assert list(not_imported) == ["organization_id", "zeta"]


def test_an_unmapped_model_names_the_command_that_maps_it(server: ServerProcess, tmp_path: Path, data: Path) -> None:
    export = {**EXPORT, "model": "gpt-5-nano"}
    done = import_command(server, tmp_path, export, "--data", str(data))
    assert done.returncode == 1
    assert "`zeta models add gpt-5-nano SOURCE`" in done.stderr


def test_a_model_fine_tuned_at_openai_must_be_replaced(zeta: Client, data: Path) -> None:
    with pytest.raises(NotFound, match="exists only at OpenAI; replace it in the export"):
        zeta.import_openai_job({**EXPORT, "model": EXPORT["fine_tuned_model"]}, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"object": "list"}, "has the object 'list'"),
        ({"model": None}, "the model null"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "'reinforcement', which can't be"),
        ({"method": "supervised"}, "method is 'supervised'; it must be an object"),
        ({"hyperparameters": [3]}, "hyperparameters is .* it must be an object"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": -1}}}}, "n_epochs"),
    ],
)
def test_an_invalid_export_names_the_setting(zeta: Client, data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        zeta.import_openai_job({**EXPORT, **changes}, data)


def test_a_file_of_openai_must_be_given(server: ServerProcess, zeta: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"training_file is 'file-abc123'.* name it with --data FILE"):
        zeta.import_openai_job(EXPORT)
    missing = import_command(server, tmp_path, EXPORT, "--data", "missing.jsonl")
    assert missing.returncode == 2
    assert "--data is 'missing.jsonl', but there is no such file" in missing.stderr


def test_a_file_that_is_not_an_export_is_rejected(server: ServerProcess, tmp_path: Path) -> None:
    done = import_command(server, tmp_path, [EXPORT])
    assert done.returncode == 2
    assert "is not an object; export a job with" in done.stderr
