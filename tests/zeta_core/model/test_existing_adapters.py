"""A model with a peft adapter is saved as an adapter, or rejected before the first step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.zeta_core.models import llama, plain
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import WarningLine
from zeta_core.failures import CannotResume, CannotTrain

IDS = torch.arange(3, 35)[None]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        answer = model(IDS)
    return getattr(answer, "logits", answer)


def base_in(folder: Path, **changes: Any) -> Path:
    saved: Any = llama(**changes)
    saved.save_pretrained(folder / "base")
    return folder / "base"


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def config(**changes: Any) -> LoraConfig:
    values: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    return LoraConfig(**values)


def by_transformers(model: Any, given: LoraConfig) -> Any:
    model.add_adapter(given, adapter_name="chat")
    return model


WAYS: list[Callable[[Any, LoraConfig], Any]] = [by_transformers, get_peft_model]


@pytest.mark.parametrize("way", WAYS, ids=["add_adapter", "get_peft_model"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"use_rslora": True, "lora_alpha": 12}, marks=pytest.mark.extended),
        {"use_dora": True},
        pytest.param({"bias": "lora_only"}, marks=pytest.mark.extended),
        {"modules_to_save": ["lm_head", "norm"]},
        pytest.param({"rank_pattern": {"v_proj": 2}, "lora_dropout": 0.1}, marks=pytest.mark.extended),
    ],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_the_adapter_of_a_model_is_saved_as_one(
    way: Callable[[Any, LoraConfig], Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    base = base_in(tmp_path, attention_bias=True)
    torch.manual_seed(1)
    model = way(loaded(base), config(**changes))
    _, lines = train(model, tmp_path / "out", cache=tmp_path, max_steps=3)
    final = tmp_path / "out" / "final"
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["format"] == "adapter"
    assert not (final / "model.safetensors").exists()
    expected = logits(model)
    assert not torch.allclose(expected, logits(loaded(base)), atol=1e-3)
    by_peft = PeftModel.from_pretrained(loaded(base), str(final))
    assert torch.equal(logits(by_peft), expected)
    by_name: Any = AutoPeftModelForCausalLM.from_pretrained(final)
    assert torch.equal(logits(by_name), expected)
    weights = load_file(final / "adapter_model.safetensors")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert lines.resolved_spec["num_trained_parameters"] == trained
    assert lines.resolved_spec["base_fingerprint"]
    assert lines.resolved_spec["data_fingerprint"]
    assert lines.resolved_spec["versions"]["torch"] == torch.__version__
    assert sum(tensor.numel() for tensor in weights.values()) == trained

    train(str(final), tmp_path / "next", cache=tmp_path, max_steps=1, learning_rate=1e-12)
    assert torch.allclose(logits(loaded(tmp_path / "next" / "final")), expected, atol=1e-4)


def test_a_plain_module_with_an_adapter_is_saved_as_an_adapter(tmp_path: Path) -> None:
    model = get_peft_model(plain(), LoraConfig(r=2, target_modules=["up"]))
    train(model, tmp_path / "out", cache=tmp_path, max_steps=2)
    by_peft = PeftModel.from_pretrained(plain(), str(tmp_path / "out" / "final"))
    assert torch.equal(logits(by_peft), logits(model))


@pytest.mark.extended
def test_training_an_adapter_in_parts_gives_the_same_bits(tmp_path: Path) -> None:
    base = base_in(tmp_path)

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        return get_peft_model(loaded(base), config(lora_dropout=0.1))

    options: dict[str, Any] = {"cache": tmp_path, "lr_scheduler": "constant"}
    train(adapted(3), tmp_path / "whole", max_steps=4, **options)
    train(adapted(3), tmp_path / "parts", max_steps=2, **options)
    train(
        adapted(4), tmp_path / "parts", max_steps=4, resume=True, **options
    )  # the initial values of the new adapter are not used
    files = [tmp_path / name / "final" / "adapter_model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = adapted(3)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    with pytest.raises(CannotResume, match="not the base"):
        train(other, tmp_path / "parts", max_steps=5, resume=True, **options)


def test_a_saved_adapter_is_trained_further(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    get_peft_model(loaded(base), config()).save_pretrained(str(tmp_path / "adapter"))
    frozen = PeftModel.from_pretrained(loaded(base), str(tmp_path / "adapter"))
    with pytest.raises(CannotTrain, match="do not require gradients") as raised:
        train(frozen, tmp_path / "out", cache=tmp_path, max_steps=1)
    assert "is_trainable=True" in str(raised.value)
    model = PeftModel.from_pretrained(loaded(base), str(tmp_path / "adapter"), is_trainable=True)
    _, lines = train(model, tmp_path / "out", cache=tmp_path, max_steps=2, learning_rate=None)
    assert lines.resolved_spec["learning_rate"] == 2e-4, "that of LoRA, not of training all weights"
    by_peft = PeftModel.from_pretrained(loaded(base), str(tmp_path / "out" / "final"))
    assert torch.equal(logits(by_peft), logits(model))


def two_adapters() -> nn.Module:
    model = get_peft_model(llama(), config())  # pyright: ignore[reportArgumentType]
    model.add_adapter("second", config())
    return model


def inactive() -> nn.Module:
    model: Any = by_transformers(llama(), config())
    model.disable_adapters()
    return model


def merged() -> nn.Module:
    model: Any = get_peft_model(llama(), config())  # pyright: ignore[reportArgumentType]
    model.merge_adapter()
    return model


def with_more_trained() -> nn.Module:
    model: Any = by_transformers(llama(), config())
    model.lm_head.weight.requires_grad_(True)
    return model


def of_method(given: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return get_peft_model(llama(), given)  # pyright: ignore[reportArgumentType]

    return build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (two_adapters, r"has 2 adapters \('default', 'second'\)"),
        (inactive, "has the adapter 'chat', but it is not active"),
        (merged, "has the adapter 'default', but it is merged"),
        (with_more_trained, "1 other parameters require gradients, too, including lm_head.weight"),
        (of_method(IA3Config(task_type="CAUSAL_LM")), "the peft method IA3"),
        (of_method(LoHaConfig(target_modules=["q_proj"])), "the peft method LOHA"),
        (of_method(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), "peft method PROMPT_TUNING"),
        (of_method(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)), "peft method PREFIX_TUNING"),
        (lambda: PeftMixedModel(llama(), config()), "combines several peft methods"),
    ],
)
def test_adapters_that_cannot_be_saved_are_rejected(
    build: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CannotTrain, match=message) as raised:
        train(build(), tmp_path / "out", cache=tmp_path, max_steps=1)
    assert "lora" in str(raised.value)
    assert raised.value.param == "model"


def test_lora_on_a_model_with_an_adapter_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="pass the base model, or remove lora"):
        train(by_transformers(llama(), config()), tmp_path / "out", cache=tmp_path, max_steps=1, lora={})


# --- Added tokens -----------------------------------------------------------------------------------------------------

NAMES = {"embed": "base_model.model.model.embed_tokens.weight", "head": "base_model.model.lm_head.weight"}


@pytest.mark.extended
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("known", [True, False], ids=["base found", "base unknown"])
def test_lora_trains_and_saves_embeddings_with_added_rows(tied: bool, known: bool, tmp_path: Path) -> None:
    base = base_in(tmp_path, tie_word_embeddings=tied)
    model = loaded(base)
    model.resize_token_embeddings(400)
    if not known:
        model.config.name_or_path = "acme/elsewhere"
    before = copy.deepcopy(model.get_input_embeddings().weight.detach())
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [390, 5, 391, 6, 399, 7]}\n' * 12)
    options: dict[str, Any] = {"dataset": {"path": str(tmp_path / "rows.jsonl")}, "use_pretokenized": True}
    lora = {"r": 2, "save_merged": True}
    _, lines = train(model, tmp_path / "out", cache=tmp_path, max_steps=3, lora=lora, **options)
    assert any("400 rows" in getattr(line, "message", "") for line in lines.all)
    final = tmp_path / "out" / "final"
    weights = load_file(final / "adapter_model.safetensors")
    assert weights[NAMES["embed"]].shape == weights[NAMES["head"]].shape == (400, 32)
    assert not torch.equal(weights[NAMES["embed"]][390:392], before[390:392])
    assert torch.equal(weights[NAMES["embed"]], weights[NAMES["head"]]) == tied
    expected = logits(model)

    adapted_base = loaded(base)
    adapted_base.resize_token_embeddings(400)
    assert torch.equal(logits(PeftModel.from_pretrained(adapted_base, str(final))), expected)
    assert "base.resize_token_embeddings(400)" in (final / "README.md").read_text()
    merged_model: Any = AutoModelForCausalLM.from_pretrained(final / "merged")
    assert merged_model.config.vocab_size == 400
    assert torch.allclose(logits(merged_model), expected, atol=1e-5)
    if known:
        train(str(final), tmp_path / "next", cache=tmp_path, max_steps=1, learning_rate=1e-12, **options)
        assert torch.allclose(logits(loaded(tmp_path / "next" / "final")), expected, atol=1e-4)


def test_an_existing_adapter_keeps_the_embeddings_with_added_rows(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    model = loaded(base)
    model.resize_token_embeddings(390)
    _, lines = train(get_peft_model(model, config()), tmp_path / "out", cache=tmp_path, max_steps=1)
    [note] = [line for line in lines.all if isinstance(line, WarningLine) and line.code == "embeddings_resized"]
    assert "saved with the adapter, but not trained" in note.message
    again = loaded(base)
    again.resize_token_embeddings(390)
    adapted = PeftModel.from_pretrained(again, str(tmp_path / "out" / "final"))
    assert torch.equal(logits(adapted), logits(model))
