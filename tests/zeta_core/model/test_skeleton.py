"""Configurations that transformers would refuse to save are repaired or rejected before the first step."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.zeta_core.models import LLAMA_CONFIG, llama
from tests.zeta_core.runs import RecordedLines, train
from zeta_core.contract.job.events import ProgressLine, WarningLine
from zeta_core.failures import CannotTrain


def repairs(lines: RecordedLines) -> list[str]:
    return [
        line.message for line in lines.all if isinstance(line, WarningLine) and line.code == "saved_config_repaired"
    ]


def generation_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"top_k": 7, "do_sample": False}, {"early_stopping": True}, {"output_scores": True}],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("merges", [False, True], ids=["full", "merged"])
def test_ignored_generation_settings_are_saved_with_a_warning(
    settings: dict[str, Any], merges: bool, tmp_path: Path
) -> None:
    model: Any = llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    lora = {"r": 2, "save_merged": True} if merges else None
    _, lines = train(model, tmp_path / "out", cache=tmp_path, max_steps=1, lora=lora)
    folder = tmp_path / "out" / "final" / ("merged" if merges else "")
    assert settings.items() <= generation_of(folder).items()
    [message] = repairs(lines)
    assert next(iter(settings)) in message
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert settings.items() <= loaded.generation_config.to_dict().items()


def test_generation_settings_that_cannot_be_loaded_are_left_out(tmp_path: Path) -> None:
    model: Any = llama()
    model.generation_config.num_return_sequences = 3  # needs sampling or beams
    model.generation_config.max_new_tokens = 12
    model.generation_config.eos_token_id = torch.tensor([1, 4])
    _, lines = train(model, tmp_path / "out", cache=tmp_path, max_steps=1)
    loaded = GenerationConfig.from_pretrained(tmp_path / "out" / "final")
    assert (loaded.num_return_sequences, loaded.max_new_tokens) == (None, 12)
    messages = repairs(lines)
    assert any("num_return_sequences is 3" in message for message in messages)
    assert any("eos_token_id is a Tensor" in message and "[1, 4]" in message for message in messages)
    assert model.generation_config.num_return_sequences == 3, "the caller's own object is not changed"


def test_config_values_unknown_to_json_are_converted(tmp_path: Path) -> None:
    model: Any = llama()
    given = {
        "words": {"b", "a"},
        "nested": {"scales": [torch.tensor([0.5, 2.0])], "size": np.int64(3)},
        "place": Path("data/raw"),
        "kept_in": torch.bfloat16,
    }
    for name, value in given.items():
        setattr(model.config, name, value)
    model.config.temperature = 0.4  # transformers refuses to save it there
    _, lines = train(model, tmp_path / "out", cache=tmp_path, max_steps=1)
    config = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert config["words"] == ["a", "b"]
    assert config["nested"] == {"scales": [[0.5, 2.0]], "size": 3}
    assert (config["place"], config["kept_in"]) == ("data/raw", "bfloat16")
    assert "temperature" not in config
    assert generation_of(tmp_path / "out" / "final")["temperature"] == 0.4
    assert len(repairs(lines)) == 7
    assert model.config.words == {"a", "b"}


def test_a_config_that_cannot_be_saved_is_rejected_before_the_first_step(tmp_path: Path) -> None:
    model: Any = llama()
    model.config.callback = [threading.Event()]
    with pytest.raises(CannotTrain, match=r"model\.config\.callback, which is .*Event.* cannot be saved") as raised:
        train(model, tmp_path / "out", cache=tmp_path, max_steps=1)
    assert raised.value.param == "model"
    assert not list((tmp_path / "out").glob("*.part"))


class Scaled(LlamaForCausalLM):
    """Needs more than its config to be built, and cannot be copied."""

    def __init__(self, config: LlamaConfig, scale: float) -> None:
        super().__init__(config)
        self.scale = scale
        self.lock = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            answer: Any = super().forward(*args, **kwargs)
        answer.logits = answer.logits * self.scale
        return answer


@pytest.mark.parametrize("tied", [False, True])
def test_a_subclass_with_more_constructor_arguments_is_trained_and_saved(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {name: value for name, value in LLAMA_CONFIG.items() if name != "model_type"}
    model = Scaled(LlamaConfig(**values, tie_word_embeddings=tied), 0.5)
    _, lines = train(model, tmp_path / "out", cache=tmp_path, max_steps=2)
    steps = [line for line in lines.all if isinstance(line, ProgressLine) and line.loss is not None]
    assert steps
    final = tmp_path / "out" / "final"
    assert ("lm_head.weight" in load_file(final / "model.safetensors")) != tied
    loaded: Any = LlamaForCausalLM.from_pretrained(final)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
