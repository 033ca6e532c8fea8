"""LoRA in models with unusual layers: experts, and layers that peft cannot adapt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.zeta_core.models import LLAMA_CONFIG, llama, mixture
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import LogLine, WarningLine
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

    assert warning.hint is not None
    assert "lora.target_parameters" in warning.hint

    mamba = MambaForCausalLM(MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(CannotTrain, match=r"^peft rejects lora\.target_modules: .*Mamba"):
        train(mamba, tmp_path / "mamba", **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 35)[None]).logits


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_stacked_experts_are_adapted_saved_merged_and_resumed(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: Any = mixture(kind)
    untouched: Any = copy.deepcopy(base)
    lora = {"r": 2, "target_parameters": "all-experts", "save_merged": True}
    options: dict[str, Any] = {"lora": lora, "cache": tmp_path, "checkpointing_steps": 100}
    _, lines = train(base, tmp_path / "out", max_steps=4, lr_scheduler="constant", **options)
    messages = [line.message for line in lines.all if isinstance(line, LogLine)]
    [coverage] = [message for message in messages if message.startswith("LoRA adapts ")]
    total = sum(parameter.numel() for parameter in untouched.parameters())
    outside = sum(p.numel() for name, p in untouched.named_parameters() if is_left(name, p))
    assert f"LoRA adapts {1 - outside / total:.1%} of the weights of the base, and trains " in coverage
    adapted: Any = PeftModel.from_pretrained(copy.deepcopy(untouched), str(tmp_path / "out" / "final"))
    assert torch.equal(logits(adapted), logits(base))
    assert not torch.equal(logits(base), logits(untouched))
    merged = type(untouched).from_pretrained(tmp_path / "out" / "final" / "merged")
    torch.testing.assert_close(logits(merged), logits(base), atol=1e-5, rtol=1e-4)

    parts = [copy.deepcopy(untouched) for _ in range(2)]
    train(parts[0], tmp_path / "parts", max_steps=2, lr_scheduler="constant", **options)
    train(parts[1], tmp_path / "parts", max_steps=4, lr_scheduler="constant", resume=True, **options)
    files = [(tmp_path / run / "final" / "adapter_model.safetensors").read_bytes() for run in ("out", "parts")]
    assert files[0] == files[1]


def is_left(name: str, parameter: torch.Tensor) -> bool:
    """Whether LoRA leaves this weight alone: norms, embeddings, the head, and routers that are not linear layers."""
    return (
        parameter.dim() == 1
        or "embed_tokens" in name
        or "lm_head" in name
        or name.endswith(("mlp.gate.weight", "router.weight"))
    )


def test_experts_that_do_not_exist_are_rejected(tmp_path: Path) -> None:
    for names, expected in (
        ("all-experts", "is 'all-experts', but LlamaForCausalLM has no stacked experts"),
        (["experts.gate_up_proj"], r"names 'experts\.gate_up_proj', but .* has no such matrix"),
    ):
        with pytest.raises(CannotTrain, match=rf"^lora\.target_parameters {expected}"):
            train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1, lora={"r": 2, "target_parameters": names})
