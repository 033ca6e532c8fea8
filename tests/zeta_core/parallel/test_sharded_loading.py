"""Loading a model under FSDP2: each process holds its own part of the weights only, and they are the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

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
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_loads_only_its_shard(tmp_path: Path, processes: int) -> None:
    large = save(tmp_path / "large", hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
    small = save(tmp_path / "small", **LLAMA_CONFIG)
    found = load(tmp_path, processes, large, small)
    stored_bytes = (large / "model.safetensors").stat().st_size  # in bfloat16, with a header
    assert sum(rank["shard"] for rank in found["memory"]) == pytest.approx(2 * stored_bytes, rel=0.01)
    for rank in found["memory"]:
        assert rank["peak"] <= 1.2 * rank["shard"] + LARGEST_TENSOR_BYTES + NOISE_BYTES
    options: dict[str, Any] = {"seq_len": 32, "learning_rate": 1e-2, "seed": 42, "lr_scheduler": "constant"}
    alone = Trainer(
        model=str(small),
        output_dir=tmp_path / "alone",
        max_steps=4,
        batch_size=3,
        gradient_accumulate_every=4,
        **options,
    )
    assert found["resumed"]["steps_trained"] == 2
    assert found["resumed"]["loss"] == pytest.approx(alone.train_loss, abs=1e-5)
