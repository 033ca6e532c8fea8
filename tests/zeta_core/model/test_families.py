"""Model families: a small random model of each is trained, saved, resumed to the same bits, and loaded by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.real_model import smollm2
from tests.zeta_core.models import VOCABULARY
from tests.zeta_core.runs import train
from zeta.local_inputs import pack_model
from zeta_core.checkpoint.weights import read_weights
from zeta_core.contract.job.events import WarningLine
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.system.model_files import check_archive

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 16},
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "sliding_window": 16},
    "gemma3_text": {**GROUPED, "sliding_window": 16, "sliding_window_pattern": 2},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
}


QUICK = {"llama", "gpt2"}


@pytest.mark.parametrize(
    "family",
    [family if family in QUICK else pytest.param(family, marks=pytest.mark.extended) for family in FAMILIES],
)
def test_a_model_of_the_family_is_trained_saved_resumed_and_loaded(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = ConfigModel(config={"model_type": family, **COMMON, **FAMILIES[family]})
    options: dict[str, Any] = {"lr_scheduler": "constant", "learning_rate": 3e-3, "cache": tmp_path}
    straight, lines = train(model, tmp_path / "straight", max_steps=4, **options)
    # Packed documents are isolated in every family.
    assert not any(isinstance(line, WarningLine) for line in lines.all)
    train(model, tmp_path / "parts", max_steps=2, **options)
    resumed, _ = train(model, tmp_path / "parts", max_steps=4, resume=True, **options)
    assert (straight.steps_trained, resumed.steps_trained) == (4, 2)
    weights = [tmp_path / folder / "final" / "model.safetensors" for folder in ("straight", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    pack_model(weights[0].parent, tmp_path / "model.tar")
    check_archive(tmp_path / "model.tar", "model.tar")  # it can be uploaded as a base
    loaded: Any = AutoModelForCausalLM.from_pretrained(weights[0].parent)
    assert loaded.config.model_type == family
    own, trained = loaded.state_dict(), read_weights(weights[0].parent)  # files may have other names (GPT-NeoX)
    assert all(torch.equal(tensor, own[name]) for name, tensor in trained.items())
    assert torch.isfinite(loaded(torch.arange(3, 19)[None]).logits).all()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_gguf_model_is_trained_and_saved_like_any_other(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"max_steps": 1, "batch_size": 1, "learning_rate": 1e-5, "cache": tmp_path}
    data = tmp_path / "data.txt"
    data.write_text("The capital of France is Paris. The capital of Italy is Rome. " * 4)
    train(str(smollm2()), tmp_path / "out", dataset={"path": str(data)}, freeze=["model.layers.*"], **options)
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out" / "final")
    assert loaded.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(loaded(ids).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.chat_template
