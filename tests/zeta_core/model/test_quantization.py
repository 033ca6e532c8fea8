"""QLoRA with real 4-bit kernels, which bitsandbytes also has for CPUs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.zeta_core.advice_runs import apply_patch
from tests.zeta_core.dry_run.test_check import answer_to
from tests.zeta_core.models import LLAMA_CONFIG, llama, plain
from tests.zeta_core.objective.test_preference import dpo, rewards_in
from tests.zeta_core.runs import train
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.job.events import ProgressLine
from zeta_core.failures import CannotTrain, InvalidModel
from zeta_core.memory.usage import num_bytes
from zeta_core.model import packed_weights, quantization
from zeta_core.train.flops import flops_per_token

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "tie_word_embeddings": True}
IDS = torch.arange(3, 35)[None]
CPU = torch.device("cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def in_4_bits(**changes: Any) -> nn.Module:
    model = llama(**{**SHAPE, **changes})
    quantization.quantize(model, "nf4", torch.float32, CPU)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_layer_computes_with_its_dequantized_weights(dtype: torch.dtype) -> None:
    """The output and the gradient of the input are those of the dequantized weights, also after an evaluation."""
    import bitsandbytes.functional

    library: Any = bitsandbytes.functional
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 64), nn.Linear(64, 10, bias=False))
    weight = model.get_parameter("0.weight").detach().to(dtype)
    quantization.quantize(model, "nf4", dtype, CPU)
    layer: Any = model.get_submodule("0")
    again = layer.weight
    packed, state = library.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(again, library.dequantize_4bit(packed, state)), "bitsandbytes packs the same values"
    assert again.dtype == dtype
    assert 0.05 < (again - weight).float().norm() / weight.float().norm() < 0.12, "the error of nf4 is about a tenth"
    for mode in (True, False, True):
        x = torch.randn(8, 192, dtype=dtype, requires_grad=mode)
        expected = nn.functional.linear(x, again, layer.bias)
        found = layer.train(mode)(x)
        assert torch.equal(found, expected)
        if mode:
            gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (found, expected)]
            assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (256, 64), (700, 64), (1024, 64)])
def test_packed_weights_are_aligned_for_the_kernels_for_gpus(shape: tuple[int, int]) -> None:
    """These load 16 bytes of 4-bit values at a time; at any other address they end the process."""
    weight = torch.randn(shape)
    packed = packed_weights.pack(weight, torch.float32, CPU)
    assert packed_weights.num_packed_weights(packed.numel()) - weight.numel() in (0, 1), "an even number"
    codes, _ = packed_weights.quant_state(packed, weight.shape, torch.float32)
    assert (codes.data_ptr() - packed.data_ptr()) % 16 == 0
    again = packed_weights.unpack(packed, weight.shape, torch.float32)
    assert 0.05 < (again - weight).norm() / weight.norm() < 0.15


def test_linear_layers_shrink_to_an_eighth_and_others_do_not_change() -> None:
    model, base = in_4_bits(), llama(**SHAPE)
    linear = {name for name, part in base.named_modules() if type(part) is nn.Linear} - {"lm_head"}
    packed = {name.removesuffix(".packed"): p for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed.keys() == linear
    assert model.get_parameter("model.embed_tokens.weight") is model.get_parameter("lm_head.weight")
    for name, parameter in base.named_parameters():
        if name.removesuffix(".weight") not in linear:
            assert torch.equal(parameter, model.get_parameter(name)), name
    # The computed size is that of the tensors, and is the same for a model without storage.
    for name, parameter in packed.items():
        weight = base.get_parameter(f"{name}.weight")
        assert quantization.num_weights(parameter) == weight.numel()
        assert parameter.numel() == pytest.approx(4.127 / 8 * weight.numel(), rel=0.01)
    with torch.device("meta"):
        empty = llama(**SHAPE)
    quantization.quantize(empty, "nf4", torch.float32, CPU)
    assert num_bytes(empty.parameters()) == num_bytes(model.parameters())
    assert all(parameter.is_meta for parameter in empty.parameters())
    for each in (model, base):
        each.requires_grad_(False)
    assert flops_per_token(model, 32) == flops_per_token(base, 32)


def test_an_adapter_of_a_4_bit_base_is_trained_merged_and_used_again(tmp_path: Path) -> None:
    base: Any = llama(**SHAPE)
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"cache": tmp_path, "mixed_precision": "bf16", "use_activation_checkpointing": True}
    options |= {"lora": {"r": 4, "quantize": "nf4", "save_merged": True}, "eval_split": 0.01, "eval_steps": 2}
    _, lines = train(str(tmp_path / "base"), tmp_path / "out", max_steps=4, **options)
    final = tmp_path / "out" / "final"
    assert lines.resolved_spec["lora"]["quantize"] == "nf4"
    assert lines.resolved_spec["num_parameters"] == sum(p.numel() for p in base.parameters())
    (memory,) = (line.memory_parts for line in lines.all if isinstance(line, ProgressLine) and line.memory_parts)
    assert dict(memory)["weights"] < num_bytes(base.parameters()), "bfloat16 takes four times as much as nf4"
    assert lines.evaluations[4] < lines.evaluations[2]

    # The base is unchanged, and the merged model is what peft would compute.
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    untouched: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    sums: Any = PeftModel.from_pretrained(untouched, str(final)).merge_and_unload().state_dict()
    merged: Any = AutoModelForCausalLM.from_pretrained(final / "merged")
    assert "quantization_config" not in (final / "merged" / "config.json").read_text()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, sums[name].to(torch.bfloat16)), name
    state = [file for file in (final / "training_state").iterdir() if file.suffix == ".safetensors"]
    assert not any("base_layer" in key for file in state for key in load_file(file)), "the base is stored nowhere"

    # The same base with a second adapter.
    _, again = train(str(final), tmp_path / "next", cache=tmp_path, max_steps=1, lora={"r": 2, "quantize": "nf4"})
    assert again.resolved_spec["num_trained_parameters"] * 2 == lines.resolved_spec["num_trained_parameters"]


@pytest.mark.extended
def test_a_resumed_run_on_a_4_bit_base_ends_with_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": tmp_path, "lora": {"r": 2, "lora_dropout": 0.2, "quantize": "nf4"}}
    options |= {"lr_scheduler": "constant", "eval_split": 0.01, "eval_steps": 1}
    train(llama, tmp_path / "whole", max_steps=4, **options)
    train(llama, tmp_path / "parts", max_steps=2, **options)
    train(llama, tmp_path / "parts", resume=True, max_steps=4, **options)
    files = [tmp_path / folder / "final" / "adapter_model.safetensors" for folder in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_dpo_uses_the_4_bit_base_as_its_reference(tmp_path: Path) -> None:
    options = dpo(12, tmp_path, lora={"r": 4, "quantize": "nf4"}, max_steps=6)
    _, lines = train(llama(**SHAPE), tmp_path / "out", cache=tmp_path, **options)
    rewards = rewards_in(lines)
    assert rewards[0]["margin"] == 0, (
        "a new adapter does not change the outputs, and the reference uses the same layers"
    )
    assert rewards[-1]["margin"] > 0


def test_an_estimate_accounts_for_4_bit_weights() -> None:
    model = {"config": {**LLAMA_CONFIG, **SHAPE}}
    whole = answer_to({"model": model, "lora": {"r": 4}})
    packed = answer_to({"model": model, "lora": {"r": 4, "quantize": "nf4"}})
    assert (packed.num_parameters, packed.num_trained_parameters) == (
        whole.num_parameters,
        whole.num_trained_parameters,
    )
    assert packed.memory is not None
    assert packed.memory.weights == num_bytes(in_4_bits().parameters()) + 4 * (whole.num_trained_parameters or 0)


def test_quantization_without_effect_is_rejected_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"cache": tmp_path, "max_steps": 1, "lora": {"quantize": "nf4"}}
    with pytest.raises(InvalidSpec, match="DeepSpeed can't shard a 4-bit base model"):
        train(plain(), tmp_path / "out", **options, use_deepspeed=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=384, n_positions=64))
    with pytest.raises(CannotTrain, match="GPT2LMHeadModel has no linear layers that can be quantized") as raised:
        train(gpt2, tmp_path / "out", **options)
    assert (raised.value.code, raised.value.patch) == ("cannot_quantize", {"lora": {"quantize": None}})
    outcome, _ = train(gpt2, tmp_path / "not-quantized", **apply_patch(options, raised.value.patch))
    assert outcome.steps_trained == 1
    with pytest.raises(CannotTrain, match="are already quantized; load it without a quantization_config"):
        train(in_4_bits(), tmp_path / "out", cache=tmp_path, max_steps=1, lora={})
    saved: Any = llama()
    saved.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidModel, match="are already quantized by bitsandbytes; name the original model"):
        train(str(tmp_path / "saved"), tmp_path / "out", **options)
    monkeypatch.setattr(quantization, "FIRST_VERSION", (99, 0))
    with pytest.raises(CannotTrain, match=r"requires bitsandbytes 99\.0 or newer, but .* is installed"):
        train("not/read", tmp_path / "out", **options)
