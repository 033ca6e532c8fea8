"""Keys in the JSON files of a model that name code, kernels or files outside the model are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.model_archives import CONFIG, PICKLE, model_files, safetensors_file
from tests.harness.model_checks import check_upload, cleaned_files, rejection
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.validation import parse, shown

OUTSIDE = ["/etc/passwd", "../secret.txt", "a/../../secret.txt", "file:///etc/passwd", "~/.ssh/id_rsa", "owner/name"]
FILE_KEYS = ["vocab", "vocab_file", "merges", "merges_file", "tokenizer_file", "spm_file", "source_spm", "gguf_file"]
TOKENIZER_KEYS = [*FILE_KEYS, "fast_tokenizer_files", "entity_vocab", "subfolder", "cache_dir", "unknown_option"]


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("key", TOKENIZER_KEYS)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_cannot_name_files_outside_its_model(tmp_path: Path, file: str, key: str, value: str) -> None:
    message = rejection(
        tmp_path,
        {**model_files(), file: {"tokenizer_class": "BertTokenizer", key: value}}
        if "config" in file
        else {**model_files(), file: {key: value}},
    )
    assert message.startswith(f"model.tar: {file} has {key!r} = {value!r}; it ")


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
def test_json_files_cannot_name_anything_outside_their_model(tmp_path: Path, file: str, key: str, value: str) -> None:
    message = rejection(tmp_path, {**model_files(), file: {**CONFIG, key: value}})
    assert message.startswith(f"model.tar: {file} has {key!r} = {value!r}; it ")


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
def test_nested_configs_are_checked_like_the_outer_one(tmp_path: Path, where: str, key: str, value: object) -> None:
    config: dict[str, Any] = {key: value}
    for name in reversed(where.split(".")):
        config = {name: config}
    assert f"model.tar: config.json has '{where}.{key}" in rejection(tmp_path, {"config.json": {**CONFIG, **config}})


@pytest.mark.parametrize("implementation", ["flash_attention_2", "paged|owner/kernel", "msa|a/b", "deepgemm", "", 3])
def test_only_attention_implementations_of_torch_are_accepted(tmp_path: Path, implementation: object) -> None:
    message = rejection(tmp_path, {"config.json": {**CONFIG, "attn_implementation": implementation}})
    assert message.endswith("it must be 'eager' or 'sdpa'; third-party kernels are never loaded.")
    check_upload(tmp_path, {"config.json": {**CONFIG, "attn_implementation": "sdpa", "experts_implementation": None}})


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
def test_code_in_a_model_is_rejected(tmp_path: Path, file: str, key: str, value: object) -> None:
    message = rejection(tmp_path, {**model_files(), "evil.py": "raise SystemExit", file: {**CONFIG, key: value}})
    assert message.startswith(f"model.tar: {file} has {key!r} = ")
    assert "code in a model is never run here; remove it." in message


@pytest.mark.parametrize(
    "name", ["AutoTokenizer", "AutoModel", "pipeline", "RagTokenizer", "os.system", "Trainer", 3, {}]
)
def test_a_tokenizer_class_must_be_the_class_of_a_tokenizer(tmp_path: Path, name: object) -> None:
    assert "has 'tokenizer_class' = " in rejection(
        tmp_path, model_files(tokenizer_config__json={"tokenizer_class": name})
    )


def test_positional_arguments_of_a_tokenizer_are_rejected(tmp_path: Path) -> None:
    check_upload(tmp_path, model_files(tokenizer_config__json={"init_inputs": []}))
    assert "'init_inputs'" in rejection(tmp_path, model_files(tokenizer_config__json={"init_inputs": ["/etc/passwd"]}))


@pytest.mark.parametrize(
    "options", [{"model_file": "/etc/passwd"}, {"model_proto": "x"}, {"alpha": "/etc/passwd"}, "x"]
)
def test_sentencepiece_options_cannot_name_files(tmp_path: Path, options: object) -> None:
    assert "sp_model_kwargs" in rejection(tmp_path, model_files(tokenizer_config__json={"sp_model_kwargs": options}))


@pytest.mark.parametrize(
    "part", [{"vocab": "/etc/passwd"}, {"vocab": {}, "merges": "/etc/passwd"}, {"vocab": {}, "vocab_file": "../x"}]
)
def test_a_tokenizer_must_contain_its_vocabulary(tmp_path: Path, part: dict[str, Any]) -> None:
    message = rejection(tmp_path, model_files(tokenizer__json={"model": {"type": "BPE", **part}}))
    assert message.startswith("model.tar: tokenizer.json has 'model.")


@pytest.mark.parametrize(
    "template",
    ["/etc/passwd", {"default": "../x.jinja"}, {"path": "file:///etc/passwd"}, [{"name": "a", "template": "~/x"}], 3],
)
def test_a_chat_template_must_be_text(tmp_path: Path, template: object) -> None:
    assert "'chat_template" in rejection(tmp_path, model_files(tokenizer_config__json={"chat_template": template}))
    check_upload(
        tmp_path,
        model_files(tokenizer_config__json={"chat_template": "{{ bos }}/{% for m in messages %}../{% endfor %}"}),
    )


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
def test_a_weight_map_must_name_safetensors_beside_it(tmp_path: Path, shard: object) -> None:
    index = {"metadata": {"total_size": 8}, "weight_map": {"x": shard}}
    files = {
        "weights.txt": PICKLE,
        "sub/model.safetensors": safetensors_file(),
        "model-1.safetensors": safetensors_file(),
    }
    message = rejection(tmp_path, {**model_files(), **files, "model.safetensors.index.json": index})
    assert message.startswith(
        f"model.tar: model.safetensors.index.json has 'weight_map.x' = {shown(shard)}; it must name a "
    )
    check_upload(
        tmp_path,
        {**model_files(), **files, "model.safetensors.index.json": {"weight_map": {"x": "model-1.safetensors"}}},
    )


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
def test_an_adapter_cannot_name_paths_or_modules(tmp_path: Path, key: str, value: object) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/name", "r": 4, "megatron_core": "megatron.core"}
    check_upload(tmp_path, model_files(adapter_config__json=adapter))
    assert f"adapter_config.json has {key!r}" in rejection(
        tmp_path, model_files(adapter_config__json={**adapter, key: value})
    )


@pytest.mark.parametrize("file", ["state.json", "data/dataset_info.json"])
def test_a_dataset_in_a_model_cannot_name_outside_files(tmp_path: Path, file: str) -> None:
    message = rejection(tmp_path, {**model_files(), file: {"_data_files": [{"filename": "/srv/other.arrow"}]}})
    assert message.startswith(f"model.tar: {file} has '_data_files")


def test_lists_in_unread_files_are_checked(tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling", "type": "models.Pooling"}]
    assert list(cleaned_files(tmp_path, {**model_files(), "modules.json": modules, "labels.json": ["a/b", 3]})) == [
        "config.json"
    ]
    check_upload(tmp_path, {**model_files(), "modules.json": modules, "labels.json": ["a/b", 3], "number.json": 5})
    message = rejection(tmp_path, {**model_files(), "modules.json": [*modules, {"path": "/etc"}]})
    assert message.startswith("model.tar: modules.json has 'modules.path' = '/etc'")
    assert "config.json contains a list; it must contain a JSON object" in rejection(
        tmp_path, {**model_files(), "config.json": [1]}
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
def test_lists_within_lists_of_unread_files_are_checked(tmp_path: Path, content: object, field: str) -> None:
    message = rejection(tmp_path, {**model_files(), "modules.json": content})
    assert message.startswith(f"model.tar: modules.json has '{field}' = ")
    check_upload(tmp_path, {**model_files(), "modules.json": [[["a/b", {"path": [["", "config.json"]]}], 3, None]]})


@pytest.mark.parametrize("key", ["attn_implementation", "auto_map", "text_config", "vocab_file"])
def test_a_spec_with_a_rejected_config_names_the_field(key: str) -> None:
    value = {"text_config": {"attn_implementation": "owner/kernel"}, "auto_map": {"AutoConfig": "a.B"}}.get(key, "a/b")
    spec = {"model": {"config": {**CONFIG, key: value}}, "dataset": {"builtin": "python-docs"}}
    with pytest.raises(InvalidSpec) as raised:
        parse(JobSpec, spec)
    assert raised.value.param == f"model.config.{key}" + (".attn_implementation" if key == "text_config" else "")
