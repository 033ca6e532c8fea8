"""The values of ``use_deepspeed``, which must not contradict the Trainer's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.zeta_core.parallel.test_parallel import case, results, why_no_deepspeed
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.failures import CannotTrain
from zeta_core.parallel.zero import zero_config
from zeta_core.plan import Plan, PlanInputs, decide_plan


def plan(**options: Any) -> Plan:
    given = TrainerOptions(batch_size=3, gradient_accumulate_every=2, **options)
    return decide_plan(given, PlanInputs(2, "cpu", False, 1, 256, 1, 1 << 30, True, "data"), None)


@pytest.mark.parametrize(
    ("use_deepspeed", "stage"),
    [(True, 2), (1, 1), (3, 3), ({"zero_optimization": {"stage": 1}}, 1), ({}, 2), ("zero.json", 3)],
)
def test_the_stage_comes_from_a_flag_a_number_a_config_or_a_file(
    use_deepspeed: Any, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = {"zero_optimization": {"stage": 3}, "train_batch_size": "auto", "gradient_clipping": 0.5}
    Path("zero.json").write_text(json.dumps(file))
    config = zero_config(use_deepspeed, plan(max_grad_norm=0.5))
    assert config["zero_optimization"]["stage"] == stage
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 2)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (12, 0.5)


def test_deepspeed_gets_the_precision_of_the_trainer() -> None:
    assert zero_config(True, plan(mixed_precision="bf16"))["bf16"] == {"enabled": True}
    assert "bf16" not in zero_config(True, plan())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size to 16, but the Trainer uses 12"),
        ({"gradient_clipping": 2.0}, "gradient_clipping to 2.0"),
        ({"optimizer": {"type": "Adam"}}, "a section 'optimizer'"),
        ({"fp16": {"enabled": True}}, "enables fp16, but mixed_precision is 'no'"),
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0; use 1, 2 or 3"),
        ("nowhere.json", "is not a readable JSON file"),
    ],
)
def test_a_config_that_contradicts_the_trainer_is_rejected(option: Any, message: str) -> None:
    with pytest.raises(CannotTrain, match=message):
        zero_config(option, plan())


@pytest.mark.extended
@pytest.mark.skipif(why_no_deepspeed() is not None, reason=why_no_deepspeed() or "")
def test_checkpoints_contain_the_float32_weights_that_are_updated(tmp_path: Path) -> None:
    cases = [
        case(str(stage), world=2, model="tied llama", use_deepspeed=stage, mixed_precision="bf16")
        for stage in (1, 2, 3)
    ]
    results(tmp_path, 2, cases)
    for stage in ("1", "2", "3"):
        weights = load_file(tmp_path / stage / "final" / "model.safetensors")
        for name, tensor in weights.items():
            assert tensor.dtype == torch.float32
            assert torch.allclose(tensor, tensor.bfloat16().float(), rtol=0.01), name
            assert name.endswith("norm.weight") or not torch.equal(tensor, tensor.bfloat16().float()), (stage, name)
