"""Resuming on a number of processes that does not divide the global batch: the same sequences, the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.parallel.test_parallel import results
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.plan import Plan, PlanInputs, decide_plan

SPLIT: dict[str, Any] = {"batch_size": 2, "gradient_accumulate_every": 2}


def plan(world_size: int, stored: Plan | None, **options: Any) -> Plan:
    facts = PlanInputs(world_size, "cpu", False, 1, 256, 1, 1 << 30, True, "data")
    return decide_plan(TrainerOptions(**options), facts, None if stored is None else stored.stored())


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 7])
def test_the_global_batch_is_the_same_for_any_number_of_processes(world_size: int) -> None:
    first = plan(1, None, **SPLIT)
    resumed = plan(world_size, first, **SPLIT)
    retried = plan(world_size, resumed, **SPLIT)
    without_split = plan(world_size, first)
    for found in (resumed, retried, without_split):
        assert found.global_batch == 4
        assert found.batch_size * found.gradient_accumulate_every * world_size >= 4
    assert (retried.batch_size, retried.gradient_accumulate_every) == (
        resumed.batch_size,
        resumed.gradient_accumulate_every,
    )
    back = plan(1, resumed, **SPLIT)
    assert (back.batch_size, back.gradient_accumulate_every) == (2, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_of_one_process_resumes_on_three_and_on_one_again(tmp_path: Path) -> None:
    """The global batch of 4 is 2 + 1 + 1 sequences for three processes, whose documents differ in length."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "count to {n}", "completion": "{"1 " * n}"}}\n' for n in range(1, 40))
    )
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}

    def part(folder: str, steps: int, *, resume: bool) -> list[dict[str, Any]]:
        options = {**SPLIT, "model": "tied llama", "max_steps": steps, "lr_scheduler": "constant", "pack": False}
        options |= {"dataset": str(tmp_path / "rows.jsonl"), "overlong": "truncate"}
        return [
            {**options, **more, "name": name, "output_dir": f"{folder}-{name}"}
            | ({"resume_from_checkpoint": f"{folder}-{name}"} if resume else {})
            for name, more in strategies.items()
        ]

    straight = results(tmp_path, 1, part("straight", 9, resume=False))
    results(tmp_path, 1, part("parts", 3, resume=False))
    results(tmp_path, 3, part("parts", 5, resume=True))
    results(tmp_path, 3, part("parts", 6, resume=True))
    found = results(tmp_path, 1, part("parts", 9, resume=True))
    for name in strategies:
        assert found[name]["steps_trained"] == 3, name
        assert found[name]["loss"] == pytest.approx(straight[name]["loss"], abs=1e-5), name
        assert found[name]["weight"] == pytest.approx(straight[name]["weight"], rel=1e-5), name
