"""The memory of ZeRO: estimates, and loading under ZeRO 3, where each process holds only its own weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zeta_core.models import LLAMA_CONFIG
from tests.zeta_core.parallel.test_parallel import environment, why_no_deepspeed
from tests.zeta_core.parallel.test_sharded_loading import LARGEST_TENSOR_BYTES, NOISE_BYTES, loss_alone, save

SCRIPT = Path(__file__).with_name("zero_memory_script.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(why_no_deepspeed() is not None, reason=str(why_no_deepspeed()))
@pytest.mark.parametrize("processes", [2, 4])
def test_zero_needs_the_estimated_memory_and_loads_only_its_own_part(tmp_path: Path, processes: int) -> None:
    large = save(tmp_path / "large", hidden_size=1024, intermediate_size=2816, num_hidden_layers=5)
    small = save(tmp_path / "small", **LLAMA_CONFIG)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(SCRIPT), str(tmp_path / "results.json"), str(large), str(small)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    for stage in found["stages"]:
        assert stage["estimate"]["total"] == pytest.approx(stage["peak"], rel=0.1)
    for rank in found["loading"]:
        assert rank["peak"] <= 1.2 * rank["shard"] + LARGEST_TENSOR_BYTES + NOISE_BYTES
    assert found["resumed"] == {"steps_trained": 2, "loss": pytest.approx(loss_alone(small, tmp_path, 4), abs=1e-5)}
