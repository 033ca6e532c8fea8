"""The files of an uploaded model: what could read another file or run code is refused, what real models have passes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness.model_archives import CONFIG, model, pack, safetensors
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.model_files import (
    ArchiveFiles,
    FolderFiles,
    InvalidModelFiles,
    check_archive,
    clean_config,
    clean_files,
    model_folder,
)
from zeta_core.contract.model_files.archive import BLOCK, MAX_EXTENSION_BYTES
from zeta_core.contract.model_files.faults import Place
from zeta_core.contract.spec import JobSpec
from zeta_core.contract.validation import parse, shown

PICKLE = b"\x80\x04K\x01."  # of the number 1
OUTSIDE = ["/etc/passwd", "../secret.txt", "a/../../secret.txt", "file:///etc/passwd", "~/.ssh/id_rsa", "owner/name"]
FILE_KEYS = ["vocab", "vocab_file", "merges", "merges_file", "tokenizer_file", "spm_file", "source_spm", "gguf_file"]
TOKENIZER_KEYS = [*FILE_KEYS, "fast_tokenizer_files", "entity_vocab", "subfolder", "cache_dir", "unknown_option"]


def check(tmp_path: Path, files: dict[str, object]) -> None:
    (tmp_path / "model.tar").write_bytes(pack(files))
    check_archive(tmp_path / "model.tar", "model.tar")


def refusal(tmp_path: Path, files: dict[str, object]) -> str:
    with pytest.raises(InvalidModelFiles) as raised:
        check(tmp_path, files)
    return raised.value.message


def cleaned(tmp_path: Path, files: Mapping[str, object]) -> dict[str, Any]:
    """What libraries would see of the JSON files of an archive."""
    (tmp_path / "model.tar").write_bytes(pack(files))
    archive = ArchiveFiles(tmp_path / "model.tar", "model.tar")
    seen = clean_files(archive, model_folder(archive), "upload", weights=True)
    return {name: None if content is None else json.loads(content) for name, content in seen}


# --- Keys that name files, repositories or code -----------------------------------------------------------------------


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("key", TOKENIZER_KEYS)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_names_no_file_outside_its_model(tmp_path: Path, file: str, key: str, value: str) -> None:
    said = refusal(
        tmp_path,
        {**model(), file: {"tokenizer_class": "BertTokenizer", key: value}}
        if "config" in file
        else {**model(), file: {key: value}},
    )
    assert said.startswith(f"model.tar: {file} has {key!r} = {value!r}; it ")


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "transformers_weights"),
        ("config.json", "backbone"),
        ("config.json", "vocab_file"),
        ("config.json", "index_path"),
        ("config.json", "encoder_name_or_path"),
        ("config.json", "attn_implementation"),
        ("config.json", "_attn_implementation"),
        ("config.json", "_attn_implementation_internal"),
        ("config.json", "experts_implementation"),
        ("config.json", "something_new"),
        ("config.json", "tokenizer_class"),
        ("config.json", "dtype"),
        ("generation_config.json", "something_new"),
        ("generation_config.json", "attn_implementation"),
        ("tokenizer_config.json", "chat_template"),
        ("tokenizer_config.json", "tokenizer_class"),
        ("processor_config.json", "tokenizer_file"),
        ("preprocessor_config.json", "image_path"),
        ("video/preprocessor_config.json", "vocab_file"),
    ],
)
def test_no_json_file_names_anything_outside_its_model(tmp_path: Path, file: str, key: str, value: str) -> None:
    said = refusal(tmp_path, {**model(), file: {**CONFIG, key: value}})
    assert said.startswith(f"model.tar: {file} has {key!r} = {value!r}; it ")


@pytest.mark.parametrize("where", ["text_config", "vision_config", "a.b.c"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "owner/kernel"),
        ("_attn_implementation", {"text_config": "owner/kernel@v1:flash"}),
        ("experts_implementation", "sonicmoe"),
        ("auto_map", {"AutoConfig": "evil.Config"}),
        ("index_path", "/proc/self/environ"),
        ("something_new", ["fine", {"deeper": "../x"}]),
    ],
)
def test_a_nested_config_is_checked_like_the_outer_one(tmp_path: Path, where: str, key: str, value: object) -> None:
    config: dict[str, Any] = {key: value}
    for name in reversed(where.split(".")):
        config = {name: config}
    assert f"model.tar: config.json has '{where}.{key}" in refusal(tmp_path, {"config.json": {**CONFIG, **config}})


@pytest.mark.parametrize("implementation", ["flash_attention_2", "paged|owner/kernel", "msa|a/b", "deepgemm", "", 3])
def test_attention_is_one_of_torch(tmp_path: Path, implementation: object) -> None:
    said = refusal(tmp_path, {"config.json": {**CONFIG, "attn_implementation": implementation}})
    assert said.endswith("it must be 'eager' or 'sdpa'; kernels of others are never loaded.")
    check(tmp_path, {"config.json": {**CONFIG, "attn_implementation": "sdpa", "experts_implementation": None}})


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json", "any/thing.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}),
        ("auto_map", {"AutoModel": "owner/name--evil.Model"}),
        ("custom_pipelines", {"task": {"impl": "evil.Pipeline"}}),
        ("trust_remote_code", True),
    ],
)
def test_a_model_brings_no_code(tmp_path: Path, file: str, key: str, value: object) -> None:
    said = refusal(tmp_path, {**model(), "evil.py": "raise SystemExit", file: {**CONFIG, key: value}})
    assert said.startswith(f"model.tar: {file} has {key!r} = ")
    assert "code that a model brings along never runs here; leave it out." in said


@pytest.mark.parametrize(
    "name", ["AutoTokenizer", "AutoModel", "pipeline", "RagTokenizer", "os.system", "Trainer", 3, {}]
)
def test_a_tokenizer_class_is_one_of_a_tokenizer(tmp_path: Path, name: object) -> None:
    assert "has 'tokenizer_class' = " in refusal(tmp_path, model(tokenizer_config__json={"tokenizer_class": name}))


def test_positional_arguments_of_a_tokenizer_are_refused(tmp_path: Path) -> None:
    check(tmp_path, model(tokenizer_config__json={"init_inputs": []}))
    assert "'init_inputs'" in refusal(tmp_path, model(tokenizer_config__json={"init_inputs": ["/etc/passwd"]}))


@pytest.mark.parametrize(
    "options", [{"model_file": "/etc/passwd"}, {"model_proto": "x"}, {"alpha": "/etc/passwd"}, "x"]
)
def test_options_of_sentencepiece_name_no_file(tmp_path: Path, options: object) -> None:
    assert "sp_model_kwargs" in refusal(tmp_path, model(tokenizer_config__json={"sp_model_kwargs": options}))


@pytest.mark.parametrize(
    "part", [{"vocab": "/etc/passwd"}, {"vocab": {}, "merges": "/etc/passwd"}, {"vocab": {}, "vocab_file": "../x"}]
)
def test_the_vocabulary_of_a_tokenizer_is_in_its_file(tmp_path: Path, part: dict[str, Any]) -> None:
    said = refusal(tmp_path, model(tokenizer__json={"model": {"type": "BPE", **part}}))
    assert said.startswith("model.tar: tokenizer.json has 'model.")


@pytest.mark.parametrize(
    "template",
    ["/etc/passwd", {"default": "../x.jinja"}, {"path": "file:///etc/passwd"}, [{"name": "a", "template": "~/x"}], 3],
)
def test_a_chat_template_is_its_text(tmp_path: Path, template: object) -> None:
    assert "'chat_template" in refusal(tmp_path, model(tokenizer_config__json={"chat_template": template}))
    check(tmp_path, model(tokenizer_config__json={"chat_template": "{{ bos }}/{% for m in messages %}../{% endfor %}"}))


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "/a/model.safetensors",
        "../other/model.safetensors",
        "weights.txt",
        "missing.safetensors",
        "~/x",
        "sub/model.safetensors",
        "file:///a/model.safetensors",
        None,
        3,
        ["model-1.safetensors"],
    ],
)
def test_a_weight_map_names_safetensors_beside_it(tmp_path: Path, shard: object) -> None:
    index = {"metadata": {"total_size": 8}, "weight_map": {"x": shard}}
    files = {
        "weights.txt": PICKLE,
        "sub/model.safetensors": safetensors(),
        "model-1.safetensors": safetensors(),
    }
    said = refusal(tmp_path, {**model(), **files, "model.safetensors.index.json": index})
    assert said.startswith(
        f"model.tar: model.safetensors.index.json has 'weight_map.x' = {shown(shard)}; it must name a "
    )
    check(tmp_path, {**model(), **files, "model.safetensors.index.json": {"weight_map": {"x": "model-1.safetensors"}}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model_name_or_path", "/srv/models/secret"),
        ("base_model_name_or_path", "../other"),
        ("base_model_name_or_path", "job_1/../../x"),
        ("auto_mapping", {"base_model_class": "X", "parent_library": "evil"}),
        ("megatron_core", "evil.module"),
        ("megatron_config", {"a": 1}),
        ("tokenizer_name_or_path", "/etc/passwd"),
        ("peft_type", "PROMPT_TUNING"),
        ("something_new", "/etc/passwd"),
    ],
)
def test_an_adapter_names_a_base_and_no_path_or_module(tmp_path: Path, key: str, value: object) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/name", "r": 4, "megatron_core": "megatron.core"}
    check(tmp_path, model(adapter_config__json=adapter))
    assert f"adapter_config.json has {key!r}" in refusal(tmp_path, model(adapter_config__json={**adapter, key: value}))


@pytest.mark.parametrize("file", ["state.json", "data/dataset_info.json"])
def test_a_data_set_in_a_model_names_no_file_outside(tmp_path: Path, file: str) -> None:
    said = refusal(tmp_path, {**model(), file: {"_data_files": [{"filename": "/srv/other.arrow"}]}})
    assert said.startswith(f"model.tar: {file} has '_data_files")


def test_a_list_in_a_file_that_nothing_reads_is_checked_and_passes(tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling", "type": "models.Pooling"}]
    assert list(cleaned(tmp_path, {**model(), "modules.json": modules, "labels.json": ["a/b", 3]})) == ["config.json"]
    check(tmp_path, {**model(), "modules.json": modules, "labels.json": ["a/b", 3], "number.json": 5})
    said = refusal(tmp_path, {**model(), "modules.json": [*modules, {"path": "/etc"}]})
    assert said.startswith("model.tar: modules.json has 'modules.path' = '/etc'")
    assert "config.json contains a list; it must contain a JSON object" in refusal(
        tmp_path, {**model(), "config.json": [1]}
    )


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ([[{"path": "/etc"}]], "modules.path"),
        ({"a": [[[{"auto_map": {"AutoModel": "evil.Model"}}]]]}, "a.auto_map"),
        ({"a": [1, [[], ["../secret"]]]}, "a"),
        ({"vocab_file": [["org/name"]]}, "vocab_file"),
        ([[["fine", {"b": [["~/x"]]}]]], "modules.b"),
    ],
)
def test_lists_within_lists_are_checked_at_every_depth(tmp_path: Path, content: object, field: str) -> None:
    message = refusal(tmp_path, {**model(), "modules.json": content})
    assert message.startswith(f"model.tar: modules.json has '{field}' = ")
    check(tmp_path, {**model(), "modules.json": [[["a/b", {"path": [["", "config.json"]]}], 3, None]]})


@pytest.mark.parametrize("key", ["attn_implementation", "auto_map", "text_config", "vocab_file"])
def test_a_spec_with_such_a_config_is_refused_with_its_field(key: str) -> None:
    value = {"text_config": {"attn_implementation": "owner/kernel"}, "auto_map": {"AutoConfig": "a.B"}}.get(key, "a/b")
    spec = {"model": {"config": {**CONFIG, key: value}}, "dataset": {"builtin": "python-docs"}}
    with pytest.raises(InvalidSpec) as raised:
        parse(JobSpec, spec)
    assert raised.value.param == f"model.config.{key}" + (".attn_implementation" if key == "text_config" else "")


# --- What real models have --------------------------------------------------------------------------------------------

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
def test_a_tokenizer_of_a_real_model_keeps_its_data(tmp_path: Path, name: str) -> None:
    config = REAL_TOKENIZERS[name]
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a/b": 0}, "merges": []}, "added_tokens": []}
    seen = cleaned(tmp_path, model(tokenizer_config__json=config, tokenizer__json=tokenizer))["tokenizer_config.json"]
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


def test_a_config_of_a_real_model_keeps_all_but_where_it_was(tmp_path: Path) -> None:
    seen = cleaned(tmp_path, {"config.json": REAL_CONFIG})["config.json"]
    assert seen == {key: value for key, value in REAL_CONFIG.items() if not key.endswith("_name_or_path")}


def test_a_repository_that_has_code_beside_a_known_model_is_read_without_it() -> None:
    config = {**CONFIG, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "tokenizer_name": "org/name"}
    config["_attn_implementation"] = "flash_attention_2"
    assert clean_config(config, Place("config.json", origin="elsewhere")) == CONFIG
    config["auto_map"] = {"AutoConfig": "owner/name--configuration.Config"}
    assert clean_config(config, Place("config.json", origin="elsewhere")) == CONFIG
    for bad in ({"auto_map": {"AutoConfig": "../c.D"}}, {"attn_implementation": "a/b"}, {"vocab_file": "/etc/x"}):
        with pytest.raises(InvalidModelFiles):
            clean_config({**CONFIG, **bad}, Place("config.json", origin="elsewhere"))


def test_quantized_weights_are_dequantized_without_a_kernel_of_the_hub(tmp_path: Path) -> None:
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"], "kernel": "plain"}
    seen = cleaned(tmp_path, {"config.json": {**CONFIG, "quantization_config": quantized}})["config.json"]
    assert seen["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head"],
        "dequantize": True,
    }
    for method in ("gptq", "awq", "metal", None):
        assert "cannot be trained" in refusal(
            tmp_path, {"config.json": {**CONFIG, "quantization_config": {"quant_method": method}}}
        )


def test_only_files_that_a_model_consists_of_reach_a_library(tmp_path: Path) -> None:
    files = {
        "a/config.json": CONFIG,
        "a/model.safetensors": safetensors(),
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
    assert set(cleaned(tmp_path, files)) == {
        *("config.json", "model.safetensors", "vocab.txt", "additional_chat_templates/tool.jinja"),
    }


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (PICKLE, "is not a safetensors file"),
        (b"PK\3\4" + b"\0" * 100, "is not a safetensors file"),
        (b"", "is not a safetensors file"),
        (safetensors(length=1 << 40), "claims a header of 1099511627776 bytes"),
        (safetensors(length=1000), "claims a header of 1000 bytes"),
        (safetensors(b'{"x": 1'), "is not valid JSON"),
        (
            safetensors({"x": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}),
            "of dtype 'Q9', which is not known",
        ),
        (safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}), "at byte 4 instead of 0"),
        (safetensors({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "do not fit each other"),
        (safetensors({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "malformed shape"),
        (safetensors({"x": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}), "do not fit"),
        (safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}), "do not fit each other"),
        (safetensors({"x": {"dtype": "F32", "shape": [2]}}), "malformed shape or data_offsets"),
        (safetensors({"x": 3}), "of dtype 'None', which is not known"),
        (safetensors(data=b"\0" * 9), "has 78 bytes, and its header describes 77"),
        (safetensors(data=b"\0" * 4), "it is truncated or damaged"),
        (safetensors({"__metadata__": {"a": {}}}, b""), "__metadata__"),
    ],
)
def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    said = refusal(tmp_path, {**model(), "model.safetensors": content})
    assert "model.tar: model.safetensors " in said
    assert told in said, said


def test_two_tensors_may_not_share_their_bytes(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "at byte 0 instead of 8" in refusal(tmp_path, model(model__safetensors=safetensors({"x": one, "y": one})))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "BF16", "F8_E4M3", "C64", "BOOL"])
def test_safetensors_of_every_dtype_pass(tmp_path: Path, dtype: str) -> None:
    import safetensors as library

    bits = {"F4": 4, "F6_E2M3": 6, "BF16": 16, "F8_E4M3": 8, "C64": 64, "BOOL": 8}[dtype]
    content = safetensors({"x": {"dtype": dtype, "shape": [4, 2], "data_offsets": [0, bits]}}, b"\0" * bits)
    check(tmp_path, {**model(), "model.safetensors": content})
    assert library.deserialize(content)[0][1]["dtype"] == dtype, "and the library agrees"


def test_a_gguf_file_begins_as_one(tmp_path: Path) -> None:
    check(tmp_path, {"model.gguf": b"GGUF" + b"\0" * 20})
    assert "model.gguf is not a GGUF file" in refusal(tmp_path, {"model.gguf": PICKLE})


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a":' * 100 + b"1" + b"}" * 100, "is nested more than 64 levels deep"),
        (b'{"a":' * 100_000, "is nested more than 64 levels deep"),
        (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "is nested more than 64 levels deep"),
        (b"not JSON", "is not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("\ufeff{}".encode(), "starts with a byte order mark; encode it as UTF-8 without one"),
        (b'{"a": "\xe9"}', "is not UTF-8 text (byte 0xe9 in line 1)"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "gives 'c' twice in one object; keep one of them"),
        (b'{"a": [' + b"0," * 8_000_001 + b"0]}", "has too many values"),
        (b'{"a": [' + b"[]," * 2_000_001 + b"0]}", "has too many values"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not valid JSON"),
        (b" " * (65 << 20), "has 68157440 bytes"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "any.json"])
def test_json_that_is_too_deep_or_too_large_is_refused(tmp_path: Path, file: str, content: bytes, told: str) -> None:
    said = refusal(tmp_path, {**model(), file: content})
    assert said.startswith(f"model.tar: {file} ")
    assert told in said, said


def test_a_lone_surrogate_in_a_model_file_is_refused_by_its_field(tmp_path: Path) -> None:
    said = refusal(tmp_path, {**model(), "config.json": b'{"model_type": "llama", "a": ["\\ud83d"]}'})
    assert said == "model.tar: config.json: a.0 contains the lone surrogate U+D83D; remove it."


def test_control_characters_and_infinite_numbers_are_kept_in_model_files(tmp_path: Path) -> None:
    content = b'{"model_type": "mamba2", "time_step_limit": [0.0, Infinity], "note": "\\u001b \\ud83d\\ude00"}'
    seen = cleaned(tmp_path, {"config.json": content})["config.json"]
    assert seen == {"model_type": "mamba2", "time_step_limit": [0.0, float("inf")], "note": "\x1b \U0001f600"}


def test_a_duplicate_control_character_is_reported_by_its_escape(tmp_path: Path) -> None:
    content = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"\\u001b": 1, "\\u001b": 2}}}'
    message = refusal(tmp_path, {**model(), "tokenizer.json": content})
    assert message == r"model.tar: tokenizer.json gives '\x1b' twice in one object; keep one of them."


def test_published_models_may_contain_duplicate_names_in_files_that_are_rewritten(tmp_path: Path) -> None:
    duplicate = json.dumps(CONFIG).replace('"vocab_size"', '"vocab_size": 1, "vocab_size"')
    (tmp_path / "config.json").write_text(duplicate)
    (tmp_path / "results.json").write_text('{"step": 1, "step": 2}')
    files = FolderFiles(tmp_path, "org/name")
    (found,) = clean_files(files, ".", "elsewhere", weights=True)
    assert json.loads(found[1] or b"") == CONFIG
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": "../x"}, "model": {"type": "BPE", "vocab": {}}}')
    with pytest.raises(InvalidModelFiles, match=r"tokenizer\.json gives 'model' twice in one object"):
        list(clean_files(FolderFiles(tmp_path, "org/name"), ".", "elsewhere", weights=True))


# --- Archives ---------------------------------------------------------------------------------------------------------


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **changes: Any) -> bytes:
    """One header of a tar, as `tarfile` writes it."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(record: bytes, kind: bytes = b"x") -> bytes:
    return entry("pax", kind, len(record)) + record + b"\0" * (-len(record) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d " % length) + len(key) + len(value) + 2 != length:
        length = len(b"%d " % length) + len(key) + len(value) + 2
    return b"%d %s=%s\n" % (length, key, value)


LINKS: list[tuple[bytes, str]] = [
    (tarfile.SYMTYPE, "is a link"),
    (tarfile.LNKTYPE, "is a link"),
    (tarfile.CHRTYPE, "is a device"),
    (tarfile.BLKTYPE, "is a device"),
    (tarfile.FIFOTYPE, "is a device"),
    (b"S", "is a sparse file"),
    (b"D", "is of the unknown type"),
    (b"Z", "is of the unknown type"),
]


def refused_archive(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "model.tar").write_bytes(content)
    with pytest.raises(InvalidModelFiles) as raised:
        check_archive(tmp_path / "model.tar", "model.tar")
    return raised.value.message


@pytest.mark.parametrize(("kind", "told"), LINKS)
def test_a_member_that_is_not_a_plain_file_is_refused_by_name(tmp_path: Path, kind: bytes, told: str) -> None:
    said = refused_archive(tmp_path, entry("vocab.txt", kind, linkname="/etc/passwd"))
    assert said.startswith("model.tar holds 'vocab.txt', which ")
    assert told in said


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.json",
        "a/../../x.json",
        "a\\..\\x.json",
        "C:/x.json",
        "a\nb.json",
        "x" * 300 + ".json",
        "abcdefgh/" * 200 + "x",
    ],
)
def test_a_name_that_leads_out_or_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    assert f"model.tar holds {name[:200]!r}, which " in refused_archive(tmp_path, entry(name))


def test_a_name_with_a_null_byte_is_refused(tmp_path: Path) -> None:
    assert "control character" in refused_archive(tmp_path, pax(record(b"path", b"config.json\0.txt")) + entry("a"))


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "config.json"),
        ("config.json", "./config.json"),
        ("config.json", "CONFIG.json"),
        ("caf\u00e9.json", "cafe\u0301.json"),
        ("a", "a/b.json"),
        ("a/b.json", "a"),
        ("a//b.json", "a/b.json"),
    ],
)
def test_two_members_that_are_one_file_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    said = refused_archive(tmp_path, b"".join(entry(name) for name in names))
    assert "twice, or under a name that differs in case only" in said


@pytest.mark.parametrize("key", [b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.realsize", b"GNU.sparse.name"])
def test_a_sparse_file_in_a_pax_header_is_refused(tmp_path: Path, key: bytes) -> None:
    assert "sparse file" in refused_archive(tmp_path, pax(record(key, b"1")) + entry("a.json"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pax(b"x" * MAX_EXTENSION_BYTES + b"y"), "has an extended header of 65537 bytes"),
        (entry("long", b"L", 1 << 33), "has an extended header of 8589934592 bytes"),
        (entry("long", b"K", 1 << 33), "has an extended header of 8589934592 bytes"),
        (entry("g", b"g", 1 << 33), "has an extended header of 8589934592 bytes"),
        (pax(b"999999 path=x\n"), "malformed pax header"),
        (pax(b"0 path=x\n"), "malformed pax header"),
        (pax(b"-5 path=x\n"), "malformed pax header"),
        (pax(b"x" * 1000), "malformed pax header"),
        (pax(record(b"path", b"x"), b"g"), "gives all its members one path"),
        (pax(record(b"size", b"9" * 30)) + entry("a"), "the size '999999999999999999999999999999'"),
        (pax(record(b"size", b"-1")) + entry("a"), "the size '-1'"),
        (pax(record(b"size", b"1000000")) + entry("a"), "is truncated: 'a' has 1000000 bytes"),
        (entry("a", size=1 << 40), "is truncated: 'a' has 1099511627776 bytes"),
        (entry("a", b"L", 100), "is truncated: it ends inside a header"),
        (pax(record(b"path", b"\xff\xfe")) + entry("a"), "a name that is not UTF-8"),
        (b"x" * 512, "is not a readable .tar"),
        (entry("a")[:148] + b"0000000\0" + entry("a")[156:], "is not a readable .tar"),
        (b"".join(entry(f"{number}.txt") for number in range(20_001)), "has more than 20000 members"),
    ],
)
def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    assert told in refused_archive(tmp_path, content)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_archives_of_every_tar_are_read(tmp_path: Path, kind: int) -> None:
    names = ["config.json", f"{'d' * 60}/{'f' * 90}.txt", "x.txt"]
    if kind != tarfile.USTAR_FORMAT:
        names.append(f"{'g' * 120}/é{'h' * 120}.txt")
        names.append(f"x{'é' * 60}.txt")  # the header's 100 bytes end within a character
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as archive:
        folder = tarfile.TarInfo("d" * 60)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(f"./{name}" if name == "x.txt" else name)
            info.size = 2
            info.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(b"{}"))
    (tmp_path / "model.tar").write_bytes(made.getvalue())
    files = ArchiveFiles(tmp_path / "model.tar", "model.tar")
    assert dict(files.sizes) == dict.fromkeys(names, 2)
    for name in names:
        with files.open(name) as stream:
            assert stream.read() == b"{}"


# --- Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["/etc/passwd", "../secret", "missing/../../secret"])
def test_a_link_out_of_a_folder_is_refused_by_name(tmp_path: Path, link: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "inside.txt").symlink_to("config.json")
    assert set(FolderFiles(folder, "model").sizes) == {"config.json", "inside.txt"}
    (folder / "vocab.txt").symlink_to(link)
    with pytest.raises(InvalidModelFiles, match=r"model holds 'vocab.txt', a link that leads out of it"):
        FolderFiles(folder, "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights/model.PT", "consolidated.00.pth"])
def test_a_model_with_pickled_weights_alone_is_refused(tmp_path: Path, name: str) -> None:
    files: dict[str, object] = {"config.json": CONFIG, name: b"\x80\x04."}
    assert f"{name} is not safetensors" in refusal(tmp_path, files)
    check(tmp_path, {**files, "model.safetensors": safetensors()})


@pytest.mark.parametrize(
    "files", [{}, {"notes.txt": "hello"}, {"data.json": {"a": 1}, "model.safetensors": safetensors()}]
)
def test_an_archive_without_a_model_or_tokenizer_is_refused(tmp_path: Path, files: dict[str, object]) -> None:
    assert "holds no config.json" in refusal(tmp_path, files)
