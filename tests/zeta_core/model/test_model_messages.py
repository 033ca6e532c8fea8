"""Incomplete model files and missing requirements are rejected with the cause and a fix."""

from __future__ import annotations

import json
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.system.model_files import InvalidModelFiles, check_archive

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0f1e" * 16 + b"\nsize 987654\n"
LOCATIONS = SourceLocations(any_path=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=384
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_git_lfs_pointer_instead_of_weights_is_reported(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)
    located = locate_model(str(folder), LOCATIONS, tmp_path / "cache")
    with pytest.raises(InvalidModel, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull"):
        located.build()
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        archive.add(folder, "model")
    with pytest.raises(InvalidModelFiles, match=r"model/model\.safetensors is a Git LFS pointer.*git lfs pull"):
        check_archive(tmp_path / "model.tar", "model.tar")


def test_a_git_lfs_pointer_instead_of_a_tokenizer_is_reported(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))
    (folder / "tokenizer.json").write_bytes(POINTER)
    located = locate_model(str(folder), LOCATIONS, tmp_path / "cache")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json is a Git LFS pointer.*git lfs pull"):
        locate_tokenizer(None, located, LOCATIONS, tmp_path / "cache")


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_the_error_of_a_sentencepiece_tokenizer_names_the_package(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    located = locate_model(str(folder), LOCATIONS, tmp_path / "cache")
    with pytest.raises(InvalidModel, match=r"SentencePiece model \(tokenizer\.model\).*pip install sentencepiece"):
        locate_tokenizer(None, located, LOCATIONS, tmp_path / "cache")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": "two"}, "model.config.num_hidden_layers is 'two'; it must be a whole number."),
        ({"hidden_act": 4}, "model.config.hidden_act is 4; it must be text."),
        (
            {"hidden_size": 30, "num_attention_heads": 4},
            "model.config is not a valid llama config: The hidden size (30) is not a multiple of the number of "
            "attention heads (4); correct it.",
        ),
    ],
)
def test_an_invalid_config_is_explained_in_one_sentence(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel) as caught:
        locate_model(ConfigModel(config={"model_type": "llama", **fields}), LOCATIONS, tmp_path)
    assert caught.value.message == message


def test_an_unreachable_hub_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InvalidModel, match=r"the Hub cannot be reached.*HF_ENDPOINT"):
        locate_model("nobody/no-such-model", LOCATIONS, tmp_path)


@pytest.mark.parametrize("length", [20, 400, -100])
def test_a_truncated_gguf_file_is_reported(length: int, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:length])
    located = locate_model(str(path), LOCATIONS, tmp_path / "cache")
    with pytest.raises(InvalidModel, match=r"small\.gguf cannot be read: .*probably truncated"):
        located.build()
