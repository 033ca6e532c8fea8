"""QLoRA under FSDP2: the packed weights of the base are sharded, and the results are those of one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.parallel.test_parallel import case, results

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

EVALUATED: dict[str, Any] = {"eval_split": 0.01, "eval_steps": 3, "lr_scheduler": "constant"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("tied llama", {**EVALUATED, "lora": {"r": 4, "quantize": "nf4"}}),
    "experts": (
        "mixture",
        {**EVALUATED, "use_activation_checkpointing": True, "lora": {"r": 4, "quantize": "nf4-experts"}},
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_adapter_of_a_sharded_4_bit_base_trains_as_on_one_process_and_resumes(tmp_path: Path) -> None:
    alone = results(
        tmp_path, 1, [case(f"alone-{kind}", world=1, model=m, steps=6, **o) for kind, (m, o) in KINDS.items()]
    )
    cases: list[dict[str, Any]] = []
    for kind, (model, options) in KINDS.items():
        cases.append(case(f"whole-{kind}", world=2, model=model, steps=6, use_fsdp=True, **options))
        parts = f"parts-{kind}"
        for steps, resumed in ((3, {}), (6, {"resume_from_checkpoint": parts})):
            part = case(parts, world=2, model=model, steps=steps, use_fsdp=True, **options, **resumed)
            cases.append({**part, "name": f"{parts}-{steps}"})
    found = results(tmp_path, 2, cases)
    for kind in KINDS:
        one, two = alone[f"alone-{kind}"], found[f"whole-{kind}"]
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5), kind
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5), kind
        assert found[f"parts-{kind}-6"]["steps_trained"] == 3
        files = [tmp_path / f"{run}-{kind}" / "final" / "adapter_model.safetensors" for run in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes(), kind
