"""Starting the processes of a script; no set-up silently trains something else."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ports import free_loopback_port
from tests.zeta_core.models import plain
from tests.zeta_core.parallel.test_parallel import SCRIPT, case, environment, why_no_deepspeed
from tests.zeta_core.runs import train
from zeta_core.environment import ProcessRank
from zeta_core.failures import CannotTrain
from zeta_core.parallel import process_group
from zeta_core.parallel.processes import Processes

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def run(folder: Path, *words: str) -> tuple[int, str]:
    """Run a program; returns its exit code and its output."""
    command = subprocess.run(
        words, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=150
    )
    return command.returncode, command.stdout.decode()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_accelerate_launch_never_trains_one_process_instead_of_several(tmp_path: Path) -> None:
    def train(world: int, flag: str, *cases: dict[str, Any]) -> tuple[int, str]:
        start = [*ACCELERATE, flag, "--num_processes", str(world), "--main_process_port", "0"]
        return run(tmp_path, *start, str(SCRIPT), f"{flag}.json", *map(json.dumps, cases))

    code, output = train(1, "--cpu", case("alone", world=1))
    assert code == 0, output
    code, output = train(2, "--multi_gpu", case("ddp", world=2), case("fsdp2", world=2, use_fsdp=True))
    assert code == 0, output
    alone = json.loads((tmp_path / "--cpu.json").read_text())["alone"]
    found: dict[str, Any] = json.loads((tmp_path / "--multi_gpu.json").read_text())
    assert found.keys() == {"ddp", "fsdp2"}
    for result in found.values():
        assert result["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert result["weight"] == pytest.approx(alone["weight"], rel=1e-5)
    code, output = train(2, "--cpu", case("rejected", world=2))
    assert code == 1
    assert "started a single process without a rank, but several were requested" in output
    assert "torchrun --nproc-per-node" in output
    assert not (tmp_path / "rejected").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_misconfigurations_that_accelerate_accepts_are_rejected(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("misconfigured_script.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, output = run(tmp_path, *torchrun, script, "results.json")
    assert code == 0, output
    results: dict[str, str] = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("right") == "accepted: DistributedDataParallel"
    messages = {
        "WithoutCpu": "set up DistributedType.NO with 1 processes instead of DistributedType.MULTI_CPU with 2",
        "OnlyBackend": "set up DistributedType.NO with 2 processes instead of DistributedType.MULTI_CPU with 2",
        "PluginDropped": "use_fsdp did not shard the model DistributedDataParallel",
        "ZeroDropped": "set up DistributedType.MULTI_CPU with 2 processes instead of DistributedType.DEEPSPEED with 2",
        "ZeroUncounted": "DistributedType.DEEPSPEED with 1 processes instead of DistributedType.DEEPSPEED with 2",
        "connected by the script": "WORLD_SIZE is 1, but the process group has 2 processes",
    }
    if why_no_deepspeed() is not None:
        del messages["ZeroDropped"], messages["ZeroUncounted"]
    assert results.keys() == messages.keys()
    for name, message in messages.items():
        assert message in results[name]


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
    ids=lambda variables: " ".join(variables),
)
def test_processes_that_cannot_connect_are_rejected(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CannotTrain, match="torchrun --nproc-per-node N"):
        ProcessRank.from_environment()


def test_missing_processes_are_reported_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_loopback_port())}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "GROUP_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(CannotTrain, match=r"2 processes could not connect at 127\.0\.0\.1:\d+ within"):
        Processes(ProcessRank.from_environment(), need_group=False)


def test_a_rank_alone_or_a_world_size_of_one_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert ProcessRank.from_environment() == ProcessRank()


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("ACCELERATE_USE_FSDP", "true", "pass use_fsdp=True"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "pass use_deepspeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "which uses 'no'"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "pass compile=True"),
    ],
)
def test_accelerate_variables_that_contradict_the_trainer_are_rejected(
    name: str, value: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(CannotTrain, match=f"{name} is {value!r}") as raised:
        train(plain(), tmp_path / "out", cache=tmp_path, max_steps=1)
    assert fix in (raised.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_accelerate_variables_that_agree_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agree = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no",
             "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
             "FSDP_ACTIVATION_CHECKPOINTING": "true"}  # fmt: skip
    plainly, _ = train(plain(), tmp_path / "plainly", cache=tmp_path, max_steps=2, use_fsdp=True)
    for name, value in agree.items():
        monkeypatch.setenv(name, value)
    with_them, _ = train(plain(), tmp_path / "with", cache=tmp_path, max_steps=2, use_fsdp=True)
    assert with_them.progress.loss_sum == plainly.progress.loss_sum
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(CannotTrain, match="selected the device meta"):
        train(plain(), tmp_path / "meta", cache=tmp_path, max_steps=2)
