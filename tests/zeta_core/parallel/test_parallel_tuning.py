"""Adapters and evaluation with several processes: the same numbers as with one, and exact resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.zeta_core.parallel.test_parallel import case, results, why_no_deepspeed

EVALUATED: dict[str, Any] = {"eval_split": 0.01, "eval_steps": 3, "lr_scheduler": "constant"}
LORA: dict[str, Any] = {**EVALUATED, "lora": {"r": 4, "lora_alpha": 8}}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_adapters_and_evaluations_equal_those_of_one_process(tmp_path: Path) -> None:
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    if why_no_deepspeed() is None:
        strategies |= {f"zero-{stage}": {"use_deepspeed": stage} for stage in (2, 3)}
    kinds: dict[str, dict[str, Any]] = {"full": EVALUATED, "lora": LORA}
    merged = {**LORA, "lora": {**LORA["lora"], "save_merged": True}}
    alone = results(
        tmp_path, 1, [case(f"alone-{kind}", world=1, model="tied llama", steps=6, **kinds[kind]) for kind in kinds]
    )
    cases: list[dict[str, Any]] = []
    for name, options in strategies.items():
        for kind, more in (("full", EVALUATED), ("lora", merged)):
            cases.append(case(f"{name}-{kind}", world=2, model="tied llama", steps=6, **options, **more))
        parts = f"{name}-parts"
        for steps, resumed in ((3, {}), (6, {"resume_from_checkpoint": parts})):
            again = case(parts, world=2, model="tied llama", steps=steps, **options, **LORA, **resumed)
            cases.append({**again, "name": f"{parts}-{steps}"})
    found = results(tmp_path, 2, cases)
    for name in strategies:
        for kind in kinds:
            one, several = alone[f"alone-{kind}"], found[f"{name}-{kind}"]
            assert several["loss"] == pytest.approx(one["loss"], abs=1e-5), (name, kind)
            assert several["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-6 if name == "ddp" else 1e-5)
            assert several["weight"] == pytest.approx(one["weight"], rel=1e-5), (name, kind)
        assert found[f"{name}-parts-6"]["steps_trained"] == 3
        straight, parts = tmp_path / f"{name}-lora" / "final", tmp_path / f"{name}-parts" / "final"
        files = [folder / "adapter_model.safetensors" for folder in (straight, parts)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
        # The state contains only the adapter, and the merged model is complete.
        largest = max(file.stat().st_size for file in (parts / "training_state").rglob("*") if file.is_file())
        assert largest < 12 * files[0].stat().st_size, name
        shapes = {key: tensor.shape for key, tensor in load_file(straight / "merged" / "model.safetensors").items()}
        whole = load_file(tmp_path / "alone-full" / "final" / "model.safetensors")
        assert shapes == {key: tensor.shape for key, tensor in whole.items()}, name
