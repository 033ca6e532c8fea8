"""Loading and saving under FSDP2: each process holds its own part of the weights only, and the results are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from tests.zeta_core.models import LLAMA_CONFIG, llama
from tests.zeta_core.parallel.test_parallel import environment
from zeta import Trainer

SCRIPT = Path(__file__).with_name("loading_script.py")
NOISE_BYTES = 24 << 20  # of the allocator and of threads
LARGEST_TENSOR_BYTES = 4 * 1024 * 2816


def save(directory: Path, **changes: Any) -> Path:
    """A model with tied weights, stored in bfloat16."""
    cast(Any, llama(tie_word_embeddings=True, **changes).to(torch.bfloat16)).save_pretrained(directory)
    return directory


def load(folder: Path, processes: int, large: Path, small: Path) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(SCRIPT), str(folder / "results.json"), str(large), str(small)]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "processes", [pytest.param(2, marks=pytest.mark.extended), pytest.param(4, marks=pytest.mark.slow)]
)
def test_each_process_loads_and_saves_only_its_shard(tmp_path: Path, processes: int) -> None:
    large = save(tmp_path / "large", hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
    small = save(tmp_path / "small", **LLAMA_CONFIG)
    found = load(tmp_path, processes, large, small)
    stored_bytes = (large / "model.safetensors").stat().st_size  # in bfloat16, with a header
    assert sum(rank["shard"] for rank in found["memory"]) == pytest.approx(2 * stored_bytes, rel=0.01)
    for rank in found["memory"]:
        for use in ("loading", "saving"):
            assert rank[use] <= 1.2 * rank["shard"] + LARGEST_TENSOR_BYTES + NOISE_BYTES, use
    for rank, exact in zip(found["quantized"], found["memory"], strict=True):
        assert rank["shard"] < 0.16 * exact["shard"], "4 bits instead of 32"
        assert rank["loading"] <= 1.2 * rank["shard"] + LARGEST_TENSOR_BYTES + NOISE_BYTES
    assert found["resumed"] == {"steps_trained": 2, "loss": pytest.approx(loss_alone(small, tmp_path, 4), abs=1e-5)}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_of_two_processes_continues_on_three(tmp_path: Path) -> None:
    small = save(tmp_path / "small", **LLAMA_CONFIG)
    load(tmp_path, 2, small, small)
    final = tmp_path / "run" / "final"
    trained = load_file(final / "training_state" / "weights.safetensors")  # all processes wrote it
    exported = load_file(final / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in trained.items())
    resumed = load(tmp_path, 3, small, small)["resumed"]
    assert resumed == {"steps_trained": 2, "loss": pytest.approx(loss_alone(small, tmp_path, 6), abs=1e-5)}


def loss_alone(model: Path, folder: Path, steps: int) -> float | None:
    """The loss of the same run in one process, without sharding."""
    result = Trainer(
        model=str(model),
        output_dir=folder / "alone",
        max_steps=steps,
        batch_size=3,
        gradient_accumulate_every=4,
        seq_len=32,
        learning_rate=1e-2,
        seed=42,
        lr_scheduler="constant",
    )
    return result.train_loss
