"""LoRA in models with unusual layers: experts, and layers that peft cannot adapt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.zeta_core.models import LLAMA_CONFIG, llama
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import WarningLine
from zeta_core.failures import CannotTrain


def test_lora_adapts_linear_layers_of_experts_and_reports_what_peft_rejects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {name: value for name, value in LLAMA_CONFIG.items() if name != "model_type"}
    options: dict[str, Any] = {"lora": {"r": 2}, "max_steps": 1, "cache": tmp_path}
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    untouched: Any = copy.deepcopy(experts)
    _, lines = train(experts, tmp_path / "experts", **options)
    [warning] = [line for line in lines.all if isinstance(line, WarningLine) and line.code == "weights_not_adapted"]
    fused = sum(p.numel() for name, p in untouched.named_parameters() if p.dim() == 3 or name.endswith("gate.weight"))
    share = fused / sum(p.numel() for p in untouched.parameters())
    assert f"LoRA does not adapt {share:.0%} of the model's weights" in warning.message
    assert "model.layers.*.mlp.experts.gate_up_proj" in warning.message
    adapted = PeftModel.from_pretrained(untouched, str(tmp_path / "experts" / "final"))
    config: Any = adapted.peft_config["default"]
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert torch.equal(adapted.eval()(ids).logits, experts.eval()(ids).logits)

    dense = [line for line in train(llama(), tmp_path / "dense", **options)[1].all if isinstance(line, WarningLine)]
    assert "weights_not_adapted" not in [line.code for line in dense]

    mamba = MambaForCausalLM(MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(CannotTrain, match=r"^peft rejects lora\.target_modules: .*Mamba"):
        train(mamba, tmp_path / "mamba", **options)
