"""The validation of specs: each invalid field is reported with its value and a fix."""

from __future__ import annotations

from typing import Any

import pytest

from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec, ZetaError
from zeta_core.contract.job.commands import Rerun
from zeta_core.contract.spec.job_spec import JobSpec, TrainerOptions
from zeta_core.contract.spec.other_names import OTHER_NAMES
from zeta_core.contract.spec.sources import FileSource, dataset_sources
from zeta_core.contract.spec.validation import parse

SMALLEST: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "max_position_embeddings": 128}},
    "dataset": {"builtin": "python-docs"},
}


def faults_of(patch: dict[str, Any]) -> dict[str, ErrorDetail]:
    with pytest.raises(ZetaError) as caught:
        parse(JobSpec, {**SMALLEST, **patch})
    return {detail.param or "": detail for detail in caught.value.details}


def test_the_smallest_spec_has_the_documented_defaults() -> None:
    spec = parse(JobSpec, SMALLEST)
    assert (spec.optimizer, spec.lr_scheduler, spec.warmup_steps, spec.max_grad_norm) == ("adamw", "cosine", 0.03, 1.0)
    assert (spec.save_total_limit, spec.max_retries, spec.priority, spec.pack) == (3, 3, 0, None)
    assert spec.batch_size is None
    assert spec.learning_rate is None
    assert spec.seed is None


@pytest.mark.parametrize(
    ("patch", "param", "code"),
    [
        ({"batch_size": -4}, "batch_size", "out_of_range"),
        ({"batch_size": "8"}, "batch_size", "invalid_type"),
        ({"batch_size": True}, "batch_size", "invalid_type"),
        ({"learning_rate": 0}, "learning_rate", "out_of_range"),
        ({"learning_rate": float("nan")}, "learning_rate", "invalid_type"),
        ({"seq_len": 256}, "seq_len", "invalid_value"),
        ({"epochs": 1, "max_steps": 2}, "epochs", "invalid_value"),
        ({"lr_min": 1e-3, "learning_rate": 1e-4}, "lr_min", "invalid_value"),
        ({"lr_min": 1e-5, "learning_rate": "find"}, "lr_min", "invalid_value"),
        ({"lr_min": 1e-5, "lr_scheduler": "constant"}, "lr_min", "invalid_value"),
        ({"lora": {"use_dora": True}, "use_fsdp": True}, "lora.use_dora", "invalid_value"),
        ({"method": "dpo", "dpo": {"loss": "hinge"}, "dataset": {"path": "a"}}, "dpo.loss", "invalid_value"),
        ({"lora": {"target_parameters": "all-experts", "use_dora": True}}, "lora.use_dora", "invalid_value"),
        ({"lora": {"target_parameters": ["w"], "lora_dropout": 0.1}}, "lora.lora_dropout", "invalid_value"),
        ({"lora": {"target_parameters": ["w"]}, "use_fsdp": True}, "use_fsdp", "invalid_value"),
        ({"lora": {"target_parameters": ["w"]}, "use_deepspeed": 2}, "use_deepspeed", "invalid_value"),
        ({"lora": {"target_parameters": ["w"]}, "compile": True}, "compile", "invalid_value"),
        ({"lora": {"target_parameters": ["w"]}, "optimizer": "muon"}, "optimizer", "invalid_value"),
        ({"fsdp_shards": 2}, "fsdp_shards", "invalid_value"),
        ({"optimizer_states": "bf16", "optimizer": "lion"}, "optimizer_states", "invalid_value"),
        ({"optimizer_states": "8bit", "optimizer": "muon"}, "optimizer_states", "invalid_value"),
        ({"optimizer_states": "bf16", "use_deepspeed": 2}, "optimizer_states", "invalid_value"),
        ({"bf16_weights": "kahan", "optimizer": "sgd"}, "bf16_weights", "invalid_value"),
        ({"bf16_weights": "stochastic", "use_deepspeed": 2}, "bf16_weights", "invalid_value"),
        ({"bf16_weights": "stochastic", "lora": {}}, "bf16_weights", "invalid_value"),
        ({"bf16_weights": "stochastic", "mixed_precision": "no"}, "mixed_precision", "invalid_value"),
        ({"fsdp_keep_gradients": True}, "fsdp_keep_gradients", "invalid_value"),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload", "invalid_value"),
        ({"fsdp_cpu_offload": True, "use_deepspeed": 3}, "fsdp_cpu_offload", "invalid_value"),
        ({"fsdp_cpu_offload": True, "use_fsdp": True, "optimizer": "muon"}, "fsdp_cpu_offload", "invalid_value"),
        (
            {"fsdp_keep_gradients": True, "use_fsdp": True, "batch_size": 2},
            "fsdp_keep_gradients",
            "invalid_value",
        ),
        ({"method": "dpo", "pack": True, "dataset": {"path": "a"}}, "pack", "invalid_value"),
        ({"method": "orpo", "orpo": {"beta": float("inf")}, "dataset": {"path": "a"}}, "orpo.beta", "invalid_type"),
        ({"kto": {"beta": 0.1}}, "kto", "invalid_value"),
        ({"method": "orpo", "dpo": {"beta": 0.1}, "dataset": {"path": "a"}}, "dpo", "invalid_value"),
        ({"method": "kto", "dataset": {"path": "a", "format": "preference"}}, "dataset.format", "invalid_value"),
        (
            {"method": "kto", "kto": {"desirable_weight": 0}, "dataset": {"path": "a"}},
            "kto.desirable_weight",
            "out_of_range",
        ),
        ({"dataset": {"path": "a", "format": "unpaired_preference"}}, "dataset.format", "invalid_value"),
        ({"output_dir": "../elsewhere"}, "output_dir", "invalid_value"),
        ({"output_dir": "/etc"}, "output_dir", "invalid_value"),
        ({"resume_from_checkpoint": "/etc/passwd"}, "resume_from_checkpoint", "invalid_value"),
        ({"resume_from_checkpoint": "job_../x"}, "resume_from_checkpoint", "invalid_value"),
        ({"checkpointing_steps": "epock"}, "checkpointing_steps", "invalid_type"),
        ({"dataset": 3}, "dataset", "invalid_type"),
        ({"dataset": {"file": "file_1", "colums": {}}}, "dataset.colums", "unknown_field"),
        ({"dataset": {"builtin": "shakespeare"}}, "dataset.builtin", "invalid_value"),
        ({"model": {"job": "job_x", "chekpoint": "final"}}, "model.chekpoint", "unknown_field"),
        ({"metadata": {"team": 1}}, "metadata.team", "invalid_type"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", "invalid_value"),
        ({"dpo": {"beta": 0.1}}, "dpo", "invalid_value"),
        ({"method": "dpo", "train_on": "all", "dataset": {"path": "a"}}, "train_on", "invalid_value"),
        ({"method": "dpo", "dataset": {"builtin": "python-docs"}}, "dataset.builtin", "invalid_value"),
        ({"dataset": {"builtin": "python-docs", "format": "messages"}}, "dataset.format", "invalid_value"),
        ({"dataset": {"builtin": "python-docs"}, "train_on": "assistant"}, "train_on", "invalid_value"),
        ({"dataset": {"path": "a.jsonl", "format": "preference"}}, "dataset.format", "invalid_value"),
        ({"dataset": {"path": "a.jsonl", "weight": 0}}, "dataset.weight", "out_of_range"),
        ({"dataset": [{"path": "a", "weight": 2.0}, {"path": "b"}]}, "dataset.1.weight", "missing_field"),
        ({"eval_dataset": [{"path": "a", "weight": 2.0}]}, "eval_dataset.0.weight", "invalid_value"),
        ({"optimizer": "muon", "use_deepspeed": 1}, "optimizer", "invalid_value"),
        ({"optimizer": "adafactor", "use_fsdp": True}, "optimizer", "invalid_value"),
        ({"mixed_precision": "fp16", "use_fsdp": True}, "mixed_precision", "invalid_value"),
        ({"lora": {"quantize": "int8"}}, "lora.quantize", "invalid_value"),
        ({"lora": {"quantize": "nf4", "save_merged": True}, "use_fsdp": True}, "lora.save_merged", "invalid_value"),
        ({"lora": {"quantize": "nf4"}, "use_deepspeed": 2}, "lora.quantize", "invalid_value"),
        ({"lora": {"quantize": "nf4"}, "compile": True}, "compile", "invalid_value"),
        ({"use_activation_checkpointing": "some"}, "use_activation_checkpointing", "invalid_type"),
        (
            {"use_activation_checkpointing": "selective", "compile": True},
            "use_activation_checkpointing",
            "invalid_value",
        ),
        (
            {"model": "org/adapter", "lora": {"continue_adapter": True, "lora_dropout": 0.1}},
            "lora.lora_dropout",
            "invalid_value",
        ),
        ({"lora": {"continue_adapter": True}}, "lora.continue_adapter", "invalid_value"),
        ({"lora": {"r": 0}}, "lora.r", "out_of_range"),
        ({"lora": {"target_modules": []}}, "lora.target_modules", "invalid_value"),
        ({"lora": {"target_modules": ""}}, "lora.target_modules", "invalid_value"),
        ({"lora": {"target_modules": [""]}}, "lora.target_modules", "invalid_value"),
        ({"lora": {"target_modules": "q_proj|("}}, "lora.target_modules", "invalid_value"),
        ({"lora": {}, "freeze": ["*"]}, "freeze", "invalid_value"),
        ({"eval_split": 0.6}, "eval_split", "out_of_range"),
        ({"eval_steps": 5}, "eval_steps", "invalid_value"),
        ({"eval_steps": 5, "eval_split": 0}, "eval_steps", "invalid_value"),
        ({"early_stopping_patience": 2}, "early_stopping_patience", "invalid_value"),
        ({"eval_split": 0.1, "eval_dataset": {"builtin": "python-docs"}}, "eval_split", "invalid_value"),
        ({"model": {"config": {}}}, "model.config.model_type", "missing_field"),
    ],
)
def test_an_invalid_field_is_reported_with_its_code(patch: dict[str, Any], param: str, code: str) -> None:
    faults = faults_of(patch)
    assert list(faults) == [param]
    assert faults[param].code == code
    name = repr(param) if code == "unknown_field" else param
    assert faults[param].message.startswith(f"{name} is")


@pytest.mark.parametrize(
    "name",
    ["/etc", "../../etc", "~/models", "./data", "a/b/c", "s3://bucket/x", "https://host/x", "a/../b", "a b", "a\n"],
)
@pytest.mark.parametrize("param", ["model", "tokenizer", "dataset.hub", "dataset.1.hub"])
def test_a_path_or_url_is_not_a_hub_id(param: str, name: str) -> None:
    patch: dict[str, Any] = {
        "model": {"model": name},
        "tokenizer": {"tokenizer": name},
        "dataset.hub": {"dataset": {"hub": name}},
        "dataset.1.hub": {"dataset": [{"builtin": "python-docs"}, {"hub": name}]},
    }[param]
    assert faults_of(patch)[param].code == "invalid_value"


@pytest.mark.parametrize(
    "name", ["gpt2", "org/name", "Org-1/na.me_2", "org/name@main", "org/name@refs/pr/1", "o/n@0a1b"]
)
def test_a_hub_id_is_accepted_with_and_without_a_revision(name: str) -> None:
    assert parse(JobSpec, {**SMALLEST, "model": name, "tokenizer": name}).model == name


@pytest.mark.parametrize(
    ("patch", "param", "fix"),
    [
        ({"entity_name": ""}, "entity_name", "it must be text of at least 1 characters."),
        ({"output_dir": "x" * 201}, "output_dir", "it must be text of at most 200 characters."),
        ({"dataset": []}, "dataset", "it must be of at least 1 entries."),
        ({"dataset": {"file": []}}, "dataset.file", "it must be a string, or of at least 1 entries."),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", "it must be of at most 16 entries."),
    ],
)
def test_an_error_about_a_length_names_the_allowed_lengths(patch: dict[str, Any], param: str, fix: str) -> None:
    assert faults_of(patch)[param].message.endswith(fix)


def test_one_error_lists_all_faults_including_those_between_fields() -> None:
    faults = faults_of({"batch_size": -3, "seq_len": 200, "output_dir": "/x", "dataset": 3, "sequence": 1})
    assert set(faults) == {"batch_size", "seq_len", "output_dir", "dataset", "sequence"}


@pytest.mark.parametrize(("theirs", "ours"), sorted(OTHER_NAMES.items()))
def test_names_used_by_other_trainers_are_answered_with_ours(theirs: str, ours: str) -> None:
    fault = faults_of({theirs: 1})[theirs]
    assert (fault.code, fault.suggestion) == ("unknown_field", ours)
    head = ours.partition(".")[0]
    assert head in JobSpec.model_fields


def test_a_misspelt_field_gets_the_nearest_name_as_suggestion() -> None:
    assert faults_of({"learning_rat": 1e-3})["learning_rat"].suggestion == "learning_rate"


@pytest.mark.parametrize(
    ("sent", "param", "suggestion"),
    [
        ({"lora": {"rank": 8}}, "lora.rank", "lora.r"),
        ({"lora": {"lora_r": 8}}, "lora.lora_r", "lora.r"),
        ({"lora": {"alpha": 8}}, "lora.alpha", "lora.lora_alpha"),
        ({"lora": {"target_module": "all-linear"}}, "lora.target_module", "lora.target_modules"),
        ({"lora": {"bias": "none"}}, "lora.bias", None),
        ({"resources": {"num_gpus": 1}}, "resources.num_gpus", "resources.gpus"),
        ({"dataset": {"file": "file_1", "formats": "text"}}, "dataset.formats", "dataset.format"),
        ({"dataset": [{"hub": "a/b", "splits": "train"}]}, "dataset.0.splits", "dataset.0.split"),
        ({"logging_steps": 1}, "logging_steps", None),
        ({"trainer": "dpo"}, "trainer", None),
    ],
)
def test_only_similar_names_in_objects_are_suggested_with_their_full_path(
    sent: dict[str, Any], param: str, suggestion: str | None
) -> None:
    fault = faults_of(sent)[param]
    assert (fault.code, fault.suggestion) == ("unknown_field", suggestion)


def test_an_error_message_contains_the_shortened_value() -> None:
    fault = faults_of({"optimizer": "adam" * 10_000})["optimizer"]
    assert "adam" in fault.message
    assert len(fault.message) < 300


@pytest.mark.parametrize("body", [[1], None, "text", 3])
def test_a_body_that_is_not_an_object_is_rejected(body: object) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        parse(JobSpec, body)


def test_an_error_about_a_pattern_describes_what_is_allowed() -> None:
    with pytest.raises(
        ZetaError, match="from is 'yesterday'; it must be 'start', 'latest', or the name of a checkpoint"
    ):
        parse(Rerun, {"from": "yesterday"})


def test_one_error_lists_all_missing_fields() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse(JobSpec, {})
    assert [detail.param for detail in caught.value.details] == ["dataset", "model"]
    assert caught.value.body().error.param == "dataset"


def test_a_trainer_has_the_same_fields_except_model_and_dataset() -> None:
    options = parse(TrainerOptions, {"batch_size": 4, "seq_len": 128})
    assert options.dataset is None
    assert dataset_sources(options.dataset) == []


@pytest.mark.parametrize(
    ("patch", "param", "code", "text"),
    [
        ({"dataset": {}}, "dataset", "missing_field", "it must have one of 'file', 'path', 'hub' or 'builtin'"),
        ({"dataset": {"fle": "x"}}, "dataset.fle", "unknown_field", "did you mean 'dataset.file'?"),
        ({"dataset": [{"path": "x", "hub": "a/b"}]}, "dataset.0", "invalid_value", "has 'path' and 'hub'; keep one"),
        ({"model": {"pickle": "x"}}, "model", "missing_field", "one of 'config', 'job', 'file' or 'builder'"),
        (
            {"dataset": {"builtin": "python-docs", "columns": {"txt": "body"}}},
            "dataset.columns.txt",
            "unknown_field",
            "the columns are text, messages, tools",
        ),
    ],
)
def test_an_object_names_one_kind_and_columns_that_are_read(
    patch: dict[str, Any], param: str, code: str, text: str
) -> None:
    faults = faults_of(patch)
    assert list(faults) == [param]
    assert (faults[param].code, text in faults[param].message) == (code, True), faults[param].message


def test_a_dataset_is_one_source_or_a_list_of_them() -> None:
    spec = parse(JobSpec, {**SMALLEST, "dataset": [{"file": ["file_1", "file_2"]}, {"builtin": "python-docs"}]})
    first, second = dataset_sources(spec.dataset)
    assert isinstance(first, FileSource)
    assert first.file_ids == ["file_1", "file_2"]
    assert second.model_dump(exclude_unset=True) == {"builtin": "python-docs"}
