"""One of several ranks runs out of memory: all of them agree on smaller micro-batches, and continue."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.parallel.test_parallel import environment

SCRIPT = Path(__file__).with_name("memory_script.py")


def launch(folder: Path, *cases: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The results of the cases on two ranks, and the output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(SCRIPT), str(folder / "results.json"), *map(json.dumps, cases)]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads((folder / "results.json").read_text()), done.stdout.decode()


@pytest.mark.extended
@pytest.mark.timeout(200)
def test_when_memory_runs_out_on_one_rank_all_ranks_use_smaller_micro_batches(tmp_path: Path) -> None:
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    failures = {"forward": 3, "backward": 3}
    cases: list[dict[str, Any]] = [
        {"name": f"{name} {when}", "fails_in": when, "most_rows": most, **options}
        for name, options in strategies.items()
        for when, most in failures.items()
    ]
    # The optimizer's state leaves less memory for the second step.
    cases.append({"name": "fsdp2 later", "fails_in": "forward", "most_rows": 2, "after_updates": 1, "use_fsdp": True})
    given: list[dict[str, Any]] = [
        {"name": f"{name} given", "batch_size": 2, "gradient_accumulate_every": 8, **options}
        for name, options in strategies.items()
    ]
    one = {"name": "none fits", "fails_in": "forward", "most_rows": 0}
    found, output = launch(tmp_path, *cases, *given, one)
    assert output.count("Memory ran out on rank 1: batch_size is 2 and gradient_accumulate_every 8 from now on") >= 5
    for case in cases:
        expected = found[f"{case['name'].split()[0]} given"]
        assert found[case["name"]]["split"] == [2, 8], case
        if "after_updates" not in case:
            assert found[case["name"]] == expected, "the same bits as with this split from the start"
    assert found["none fits"]["error"].startswith("Memory ran out in step 1 with micro-batches of 1 sequences")
