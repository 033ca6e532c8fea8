"""The byte-level tokenizer of a checkpoint is loaded again, whatever the family of its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from tests.zeta_core.models import LLAMA_CONFIG
from tests.zeta_core.runs import train
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.data.sources import SourceLocations
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer


@pytest.mark.parametrize(
    "family", ["mistral", "qwen2"]
)  # AutoTokenizer fails for mistral, and loads another tokenizer for qwen2
def test_a_checkpoint_is_loaded_with_its_byte_level_tokenizer(family: str, tmp_path: Path) -> None:
    model = ConfigModel(config={**LLAMA_CONFIG, "model_type": family, "num_key_value_heads": 4})
    train(model, tmp_path / "out", cache=tmp_path, max_steps=1)
    locations = SourceLocations(any_path=True)
    located = locate_model(str(tmp_path / "out" / "final"), locations, tmp_path)
    tokenizer = locate_tokenizer(None, located, locations, tmp_path)
    assert type(tokenizer) is ByT5Tokenizer
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == [byte + 3 for byte in "é".encode()]
