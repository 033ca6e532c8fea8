"""FSDP2 with its shards in the memory of the host: where everything is, what it needs, and when it is rejected."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.memory.test_estimates import SMALL, run_of
from tests.zeta_core.models import llama
from tests.zeta_core.parallel.test_parallel import environment
from tests.zeta_core.runs import train
from zeta_core.environment import ProcessRank
from zeta_core.failures import CannotTrain, OutOfMemory
from zeta_core.memory.estimate import building, minimum_memory, shard_bytes
from zeta_core.memory.limits import check_host_memory
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.parallel.processes import Processes
from zeta_core.parallel.strategy import build_engine

SCRIPT = Path(__file__).with_name("offload_script.py")
OFFLOADED: dict[str, Any] = {"use_fsdp": True, "fsdp_cpu_offload": True}
CASES: dict[str, dict[str, Any]] = {
    "two processes": {"processes": 2},
    "one process": {"use_activation_checkpointing": True},
    "float32": {"processes": 4, "mixed_precision": "no"},
    "keeping gradients": {"processes": 4, "fsdp_keep_gradients": True},
    "LoRA": {"processes": 4, "lora": {"r": 8}},
    "compact states and weights": {"processes": 4, "bf16_weights": "kahan", "optimizer_states": "8bit"},
}


def on_a_fake_gpu(folder: Path, names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """The estimate and the peaks of each case, and where everything is after loading."""
    command = [sys.executable, str(SCRIPT), *(json.dumps({**OFFLOADED, **CASES[name]}) for name in names)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    *found, places = map(json.loads, done.stdout.decode().splitlines())
    return dict(zip(names, found, strict=True)), places


@pytest.mark.parametrize(
    "names", [["two processes"], pytest.param([*CASES][1:], marks=pytest.mark.extended)], ids=["one", "others"]
)
def test_the_shards_are_on_the_host_and_everything_else_on_the_gpu_as_estimated(
    names: list[str], tmp_path: Path
) -> None:
    found, places = on_a_fake_gpu(tmp_path, names)
    assert places == {
        "parameters": ["cpu"],
        "states": ["cpu"],
        "gathered": ["cpu"],
        "buffers": ["fakegpu"],
        "logits": ["fakegpu"],
        "gradients": ["cpu"],
    }
    for name, case in found.items():
        estimate, peaks = case["estimate"], case["peaks"]
        assert estimate["weights"] == estimate["optimizer"] == 0
        assert estimate["total"] == pytest.approx(peaks["fakegpu"], rel=0.01), name
        if name != "compact states and weights":  # whose update has float32 copies of a few million values
            assert estimate["host"] == pytest.approx(peaks["cpu"], rel=0.1), name


@pytest.fixture
def processes() -> Iterator[Processes]:
    group = Processes(ProcessRank(), need_group=True)
    yield group
    group.close()


def test_an_engine_with_offloaded_shards_takes_the_same_steps(processes: Processes) -> None:
    _, plan = run_of(SMALL, use_fsdp=True, mixed_precision="no", learning_rate=1e-2, seq_len=8)
    weights: list[torch.Tensor] = []
    for offloads in (False, True):
        model = llama()
        own = replace(plan, fsdp_cpu_offload=offloads)
        engine = build_engine(model, own, processes, blocks=repeated_blocks(model), deepspeed=None)
        assert ("memory of the host" in engine.optimizer_groups) == offloads
        for _ in range(3):
            for last in (False, True):
                with engine.micro_step(last=last):
                    engine.backward(engine.model(torch.arange(8)[None]).logits.square().mean())
            assert engine.clip(0.01).item() > 0.01
            engine.update(1e-2)
        weights.append(torch.cat([t.full_tensor().flatten() for t in engine.module.state_dict().values()]))
        engine.close()
    assert torch.equal(*weights)


def test_offloading_shards_is_rejected_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="has no effect on a CPU") as raised:
        train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1, **OFFLOADED)
    assert raised.value.param == "fsdp_cpu_offload"


def test_a_host_without_enough_memory_for_its_shards_is_rejected() -> None:
    located, plan = run_of(SMALL, processes=8, **OFFLOADED)
    model = building(located)(plan)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    assert shard_bytes(model, plan).optimizer == num_weights
    assert minimum_memory(model, plan, 1024).weights == 0
    check_host_memory(model, plan, 8, capacity=16 * num_weights)
    check_host_memory(model, plan, 4, capacity=8 * num_weights)
    with pytest.raises(OutOfMemory, match=r"fsdp_cpu_offload needs at least .* of this host's memory") as raised:
        check_host_memory(model, plan, 8, capacity=16 * num_weights - 1)
    assert raised.value.code == "cannot_fit"
    check_host_memory(model, replace(plan, fsdp_cpu_offload=False), 8, capacity=1)
