"""Models with data-dependent paths: ranks use different parameters, with the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.parallel.test_parallel import case, results, why_no_deepspeed

MODELS = ("skipping", "routed", "experts")
EVALUATED: dict[str, Any] = {"eval_split": 0.01, "eval_steps": 3}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_that_use_different_parameters_train_as_one_process(tmp_path: Path) -> None:
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    if why_no_deepspeed() is None:
        strategies["zero-2"] = {"use_deepspeed": 2}
    alone = results(tmp_path, 1, [case(f"alone {model}", world=1, model=model, **EVALUATED) for model in MODELS])
    cases = {
        (name, model): case(f"{name} {model}", world=2, model=model, **EVALUATED, **options)
        for name, options in strategies.items()
        for model in MODELS
    }
    found = results(tmp_path, 2, list(cases.values()))
    for name, model in cases:
        expected, result = alone[f"alone {model}"], found[f"{name} {model}"]
        assert result["loss"] == pytest.approx(expected["loss"], abs=1e-5), (name, model)
        assert result["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5), (name, model)
        decay_difference = 1e-4  # ZeRO also decays parameters that are never used
        rel = decay_difference if name == "zero-2" else 1e-5
        assert result["weight"] == pytest.approx(expected["weight"], rel=rel), (name, model)
