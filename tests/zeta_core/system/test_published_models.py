"""What published models contain is accepted, and libraries see only the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.model_archives import CONFIG, PICKLE, model_files, safetensors_file
from tests.harness.model_checks import cleaned_files, rejection
from zeta_core.contract.model_json.faults import JsonLocation
from zeta_core.system.model_files import InvalidModelFiles, clean_config

TOKEN = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
REAL_TOKENIZERS: dict[str, dict[str, Any]] = {
    "SmolLM2": {
        "add_prefix_space": False,
        "added_tokens_decoder": {"0": {**TOKEN, "special": True}, "1": {**TOKEN, "content": "/", "special": False}},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|im_start|>",
        "chat_template": "{% for message in messages %}{{ message['role'] + '/' }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "extra_special_tokens": {},
        "model_max_length": 8192,
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": 49152,
    },
    "GPT-NeoX": {
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "name_or_path": "EleutherAI/gpt-neox-20b",
        "special_tokens_map_file": "/admin/home/.cache/huggingface/transformers/ab.cd",
        "tokenizer_class": "GPTNeoXTokenizer",
        "unk_token": {"__type": "AddedToken", **TOKEN},
    },
    "Llama 2": {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "use_default_system_prompt": False,
        "vocab_file": None,
    },
    "T5": {
        "additional_special_tokens": ["<extra_id_0>"],
        "extra_ids": 100,
        "sp_model_kwargs": {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1},
        "tokenizer_file": "tokenizer.json",
        "tokenizer_class": "T5Tokenizer",
    },
    "Command R": {
        "chat_template": [{"name": "default", "template": "{{ x }}"}, {"name": "rag", "template": "{{ y }}"}],
        "errors": "replace",
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "CohereTokenizer",
        "image_token": "<image>",
        "processor_class": "Idefics3Processor",
    },
}


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_tokenizers_of_published_models_keep_their_data(tmp_path: Path, name: str) -> None:
    config = REAL_TOKENIZERS[name]
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a/b": 0}, "merges": []}, "added_tokens": []}
    seen = cleaned_files(tmp_path, model_files(tokenizer_config__json=config, tokenizer__json=tokenizer))[
        "tokenizer_config.json"
    ]
    records = {
        "name_or_path",
        "special_tokens_map_file",
        "vocab_file",
        "tokenizer_file",
        "vocab_size",
        "processor_class",
    }
    assert seen == {key: value for key, value in config.items() if key not in records}


REAL_CONFIG: dict[str, Any] = {
    "_name_or_path": "/fsx/checkpoints/step-1000",
    "_model_name_or_path": "Smollm2 135M 8k Lc100K Mix1 Ep2",
    "_attn_implementation_autoset": True,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "dtype": "bfloat16",
    "eos_token_id": [128001, 128008],
    "hidden_act": "silu",
    "id2label": {"0": "B-LOC/PER", "1": "~"},
    "layer_types": ["full_attention", "sliding_attention"],
    "model_type": "llama",
    "prefix": "</s>",
    "pad_token": "</s>",
    "stop_strings": ["</answer>", "/", "\n"],
    "rope_scaling": {"factor": 32.0, "rope_type": "llama3", "original_max_position_embeddings": 8192},
    "task_specific_params": {"translation": {"prefix": "translate English to German: ", "max_length": 50}},
    "text_config": {"model_type": "llama", "torch_dtype": "bfloat16", "rms_norm_eps": 1e-05},
    "transformers_version": "4.45.0.dev0",
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}},
    "unsloth_version": "2024.9",
}


def test_a_published_config_keeps_all_but_recorded_paths(tmp_path: Path) -> None:
    seen = cleaned_files(tmp_path, {"config.json": REAL_CONFIG})["config.json"]
    assert seen == {key: value for key, value in REAL_CONFIG.items() if not key.endswith("_name_or_path")}


def test_code_beside_a_known_published_model_is_left_out() -> None:
    config = {**CONFIG, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "tokenizer_name": "org/name"}
    config["_attn_implementation"] = "flash_attention_2"
    assert clean_config(config, JsonLocation("config.json", origin="external")) == CONFIG
    config["auto_map"] = {"AutoConfig": "owner/name--configuration.Config"}
    assert clean_config(config, JsonLocation("config.json", origin="external")) == CONFIG
    for bad in ({"auto_map": {"AutoConfig": "../c.D"}}, {"attn_implementation": "a/b"}, {"vocab_file": "/etc/x"}):
        with pytest.raises(InvalidModelFiles):
            clean_config({**CONFIG, **bad}, JsonLocation("config.json", origin="external"))


def test_quantized_weights_are_dequantized_without_hub_kernels(tmp_path: Path) -> None:
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"], "kernel": "plain"}
    seen = cleaned_files(tmp_path, {"config.json": {**CONFIG, "quantization_config": quantized}})["config.json"]
    assert seen["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head"],
        "dequantize": True,
    }
    for method in ("gptq", "awq", "metal", None):
        assert "cannot be trained" in rejection(
            tmp_path, {"config.json": {**CONFIG, "quantization_config": {"quant_method": method}}}
        )


def test_libraries_see_only_the_files_of_the_model(tmp_path: Path) -> None:
    files = {
        "a/config.json": CONFIG,
        "a/model.safetensors": safetensors_file(),
        "a/pytorch_model.bin": PICKLE,
        "a/modeling.py": "raise SystemExit",
        "a/adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "org/name"},
        "a/trainer_state.json": {"best_model_checkpoint": "/tmp/out/checkpoint-5"},
        "a/preprocessor_config.json": {"size": 3},
        "a/vocab.txt": "a\nb\n",
        "a/additional_chat_templates/tool.jinja": "{{ x }}",
        "a/._config.json": b"\0\5\26\7",
        "a/sub/config.json": CONFIG,
        "README.md": "# Model",
    }
    assert set(cleaned_files(tmp_path, files)) == {
        *("config.json", "model.safetensors", "vocab.txt", "additional_chat_templates/tool.jinja"),
    }
