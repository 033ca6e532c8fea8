"""Experts in 4 bits: a mixture-of-experts model stacks them in parameters that contain most of its weights."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.zeta_core.dry_run.test_check import answer_to
from tests.zeta_core.models import llama, mixture
from tests.zeta_core.runs import train
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.job.events import LogLine
from zeta_core.failures import CannotTrain
from zeta_core.memory.usage import num_bytes
from zeta_core.model.quantization import is_quantized, num_weights, quantize, quantize_experts

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

CPU = torch.device("cpu")
IDS = torch.arange(3, 35)[None]
LORA: dict[str, Any] = {"r": 2, "target_parameters": "all-experts", "quantize": "nf4-experts"}
OPTIONS: dict[str, Any] = {"lr_scheduler": "constant", "use_activation_checkpointing": True, "lora": LORA}


def in_4_bits(model: nn.Module) -> None:
    quantize(model, "nf4-experts", torch.float32, CPU)
    quantize_experts(model, torch.float32, CPU)


def dequantized(kind: str, quantized: nn.Module) -> nn.Module:
    """The same model with exact layers, whose values are those that the quantized ones compute with."""
    from zeta_core.model.packed_weights import unpack

    exact = mixture(kind)
    for name, parameter in quantized.named_parameters():
        own = name.replace(".packed", ".weight")
        target = exact.get_parameter(own)
        with torch.no_grad():
            target.copy_(unpack(parameter, target.shape, torch.float32) if is_quantized(parameter) else parameter)
    return exact


@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_experts_in_4_bits_compute_with_their_dequantized_weights(kind: str) -> None:
    model = mixture(kind)
    weights = sum(parameter.numel() for parameter in model.parameters())
    in_4_bits(model)
    stacks = [p for name, p in model.named_parameters() if "experts." in name]
    assert stacks
    assert all(is_quantized(parameter) for parameter in stacks)
    assert sum(map(num_weights, model.parameters())) == weights
    exact = dequantized(kind, model)
    for mode in (True, False):
        found, expected = (each.train(mode)(IDS).logits for each in (model, exact))
        torch.testing.assert_close(found, expected)
    embeddings = [each.get_parameter("model.embed_tokens.weight") for each in (model, exact)]
    gradients = [
        torch.autograd.grad(y.square().sum(), e)[0] for y, e in zip((found, expected), embeddings, strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert all(is_quantized(p) for name, p in model.named_parameters() if "experts." in name), "packed after the call"


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("llama4", marks=pytest.mark.extended)])
def test_adapted_experts_in_4_bits_are_trained_and_resumed_to_the_bit(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "cache": tmp_path}
    base = mixture(kind)
    outcome, lines = train(base, tmp_path / "whole", max_steps=4, **options)
    [coverage] = [m for line in lines.all if isinstance(line, LogLine) and "LoRA adapts" in (m := line.message)]
    untouched = mixture(kind)
    total = sum(parameter.numel() for parameter in untouched.parameters())
    packed = sum(num_weights(parameter) for parameter in base.parameters() if is_quantized(parameter))
    assert f"{packed / total:.1%} are held in 4 bits" in coverage
    assert packed / total > 0.3
    train(mixture(kind), tmp_path / "parts", max_steps=2, **options)
    train(mixture(kind), tmp_path / "parts", max_steps=4, resume=True, **options)
    files = [tmp_path / folder / "final" / "adapter_model.safetensors" for folder in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()

    # The adapter was trained on the dequantized weights.
    plain = copy.deepcopy(untouched)
    in_4_bits(plain)
    lora = {name: value for name, value in LORA.items() if name != "quantize"}
    exact: dict[str, Any] = {**options, "lora": lora}
    expected, _ = train(dequantized(kind, plain), tmp_path / "exact", max_steps=4, **exact)
    assert outcome.progress.train_loss == pytest.approx(expected.progress.train_loss, abs=1e-5)


def test_quantized_experts_are_in_the_estimate() -> None:
    config = mixture("mixtral").config.to_diff_dict()
    options = {"use_activation_checkpointing": True, "mixed_precision": "bf16"}
    answers = [
        answer_to({"model": {"config": config}, **options, "lora": {**LORA, "quantize": kind}})
        for kind in (None, "nf4", "nf4-experts")
    ]
    weights = [answer.memory.weights for answer in answers if answer.memory is not None]
    assert weights == sorted(weights, reverse=True)
    model = mixture("mixtral")
    in_4_bits(model)
    assert weights[2] == num_bytes(model.parameters()) + 4 * (answers[2].num_trained_parameters or 0)
    assert answers[2].memory is not None
    assert answers[2].memory.activations, "the kernels for 4 bits run on tensors without storage"


def test_experts_that_cannot_be_quantized_are_rejected(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": tmp_path, "max_steps": 1, "lora": {"quantize": "nf4-experts"}}
    with pytest.raises(InvalidSpec, match="add use_activation_checkpointing=true, or use 'nf4'"):
        train(llama(), tmp_path / "out", **options)
    with pytest.raises(CannotTrain, match="LlamaForCausalLM has no parameters that contain several experts") as raised:
        train(llama(), tmp_path / "out", **options, use_activation_checkpointing=True)
    assert raised.value.patch == {"lora": {"quantize": "nf4"}}
