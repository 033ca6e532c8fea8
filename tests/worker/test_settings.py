"""The worker's settings, the slots that follow from them, and which variables of the worker a run gets."""

from pathlib import Path

import pytest

from worker.machine.devices import count_cores, find_slots
from worker.run.launch import run_environment
from worker.settings import WorkerSettings
from zeta_core.contract.access import HubAccess
from zeta_core.contract.errors import InvalidSettings

SECRET = {"ZETA_WORKER_SECRET": "s"}


def read(**variables: str) -> WorkerSettings:
    return WorkerSettings.from_environment({**SECRET, **variables})


def test_names_labels_and_lists_are_parsed() -> None:
    settings = read(
        ZETA_WORKER_NAME="rack-1.gpu_7",
        ZETA_WORKER_LABELS="zone=a, disk = fast",
        ZETA_JOB_ENV="WANDB_API_KEY,NCCL_DEBUG",
        ZETA_HOME="/srv/zeta",
    )
    assert settings.worker_labels == {"zone": "a", "disk": "fast"}
    assert settings.job_env == ("WANDB_API_KEY", "NCCL_DEBUG")
    assert settings.root == Path("/srv/zeta/workers/rack-1.gpu_7")
    assert settings.artifacts == Path("/srv/zeta/artifacts")
    assert list(read(ZETA_PORTS="29400-29402").port_numbers) == [29400, 29401, 29402]
    assert list(read(ZETA_PORTS="29400").port_numbers) == [29400]
    assert list(read().port_numbers) == [0]
    assert read(ZETA_WORKER_ADDRESS="fd00:0::5").worker_address == "fd00::5"
    assert read(ZETA_ARTIFACTS_URL="file:///mnt/a%20b").artifacts == Path("/mnt/a b")


def test_the_default_name_is_a_valid_form_of_the_host_name() -> None:
    name = read().worker_name
    assert read(ZETA_WORKER_NAME=name).worker_name == name


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ZETA_WORKER_NAME", "a/b"),
        ("ZETA_WORKER_NAME", ".."),
        ("ZETA_WORKER_SLOTS", "0"),
        ("ZETA_WORKER_LABELS", "zone"),
        ("ZETA_ARTIFACTS_URL", "s3://Bucket"),
        ("ZETA_ARTIFACTS_URL", "relative/folder"),
        ("ZETA_STOP_GRACE_SECONDS", "-1"),
        ("ZETA_WORKER_ADDRESS", "worker-2"),
        ("ZETA_WORKER_ADDRESS", "0.0.0.0"),
        ("ZETA_PORTS", "29400-"),
        ("ZETA_PORTS", "29499-29400"),
        ("ZETA_PORTS", "70000"),
    ],
)
def test_an_invalid_setting_is_reported_by_its_name(variable: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=variable):
        read(**{variable: value})


def test_a_worker_without_the_secret_is_rejected() -> None:
    with pytest.raises(InvalidSettings, match="ZETA_WORKER_SECRET"):
        WorkerSettings.from_environment({})


def test_a_machine_without_gpus_offers_as_many_cpu_slots_as_configured() -> None:
    slots = find_slots(read(ZETA_WORKER_SLOTS="2").model_copy(update={"cuda_visible_devices": "-1"}), {})
    assert [(slot.slot, slot.kind, slot.device) for slot in slots] == [(0, "cpu", None), (1, "cpu", None)]
    assert count_cores() >= 1


@pytest.mark.gpu
def test_a_machine_with_gpus_offers_one_slot_for_each_visible_gpu() -> None:
    slots = find_slots(read().model_copy(update={"cuda_visible_devices": "0"}), {})
    assert [(slot.slot, slot.kind, slot.device) for slot in slots] == [(0, "cuda", "0")]
    assert slots[0].memory_bytes > 2**30


def test_the_environment_of_a_run_has_only_the_listed_variables() -> None:
    own = {
        "HOME": "/root",
        "PATH": "/usr/bin",
        "LC_ALL": "C.UTF-8",
        "https_proxy": "http://proxy:3128",
        "HF_TOKEN": "t",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "ZETA_WORKER_SECRET": "secret",
        "ZETA_REDIS_URL": "redis://:secret@host",
        "WANDB_API_KEY": "w",
        "OMP_NUM_THREADS": "64",
    }
    environment = run_environment(
        own,
        job_id="job_1",
        attempt=2,
        threads=3,
        devices=["0", "1"],
        hub=HubAccess.OFF,
        job_env=("WANDB_API_KEY", "ZETA_WORKER_SECRET"),
    )
    path = environment.pop("PATH").split(":")
    assert (len(path), path[-1]) == (2, "/usr/bin")
    environment.pop("PYTHONPATH", None)  # only from a checkout
    assert environment == {
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "https_proxy": "http://proxy:3128",
        "HF_HOME": "/root/.cache/huggingface/public",
        "WANDB_API_KEY": "w",
        "ZETA_JOB_ID": "job_1",
        "ZETA_ATTEMPT": "2",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "USE_HUB_KERNELS": "0",
    }


TOKENS = {"HF_TOKEN": "t", "HUGGING_FACE_HUB_TOKEN": "t"}


@pytest.mark.parametrize(
    ("access", "own", "is_token_stored", "expected"),
    [
        (HubAccess.OPERATOR_TOKEN, TOKENS, False, {**TOKENS, "HF_HOME": "{home}"}),
        (HubAccess.PUBLIC, TOKENS, False, {"HF_HOME": "{home}/public"}),
        (HubAccess.PUBLIC, {}, True, {"HF_HOME": "{home}/public"}),
        (HubAccess.PUBLIC, {}, False, {"HF_HOME": "{home}"}),
        (HubAccess.OFF, TOKENS, False, {"HF_HOME": "{home}/public", "HF_HUB_OFFLINE": "1"}),
    ],
)
def test_only_projects_with_the_operators_token_get_it_and_its_cache(
    tmp_path: Path, access: HubAccess, own: dict[str, str], is_token_stored: bool, expected: dict[str, str]
) -> None:
    if is_token_stored:
        (tmp_path / "token").write_text("t")
    environment = run_environment(
        {**own, "HF_HOME": str(tmp_path)},
        job_id="job_1",
        attempt=1,
        threads=1,
        devices=[],
        hub=access,
        job_env=("HUGGING_FACE_HUB_TOKEN",),
    )
    of_the_hub = {name: value for name, value in environment.items() if name.startswith(("HF_", "HUGGING_FACE"))}
    assert of_the_hub == {name: value.format(home=tmp_path) for name, value in expected.items()}
