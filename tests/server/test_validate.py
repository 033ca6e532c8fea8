"""POST /v1/jobs/validate checks a spec like a submission and estimates the job before it runs."""

from typing import Any

import httpx
import pytest

from server.estimates.parameter_counts import count_parameters
from tests.server.rows import Rows
from tests.server.server_process import SPEC, error_of

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 90,
}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", **TINY},
        {"model_type": "llama", **TINY, "num_key_value_heads": None, "tie_word_embeddings": True, "head_dim": 16},
        {"model_type": "llama", **TINY, "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral", **TINY},
        {"model_type": "qwen2", **TINY, "tie_word_embeddings": True},
        GPT2,
        {**GPT2, "n_inner": 40, "tie_word_embeddings": False},
    ],
    ids=lambda config: f"{config['model_type']}-{len(config)}",
)
def test_parameter_counts_match_the_real_models(config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **given))
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_missing_numbers_of_a_config_are_not_guessed() -> None:
    assert count_parameters({"model_type": "llama", **TINY, "vocab_size": None}) is None
    assert count_parameters({"model_type": "mistral", **TINY, "num_key_value_heads": None}) is None
    assert count_parameters({"model_type": "mamba", **TINY}) is None


def test_unknown_estimates_of_a_valid_spec_have_a_reason(rows: Rows, http: httpx.Client) -> None:
    before = http.get("/v1/jobs").json()
    spec = {**SPEC, "model": {"config": {"model_type": "llama", **TINY}}}
    response = http.post("/v1/jobs/validate", json=spec)
    assert response.status_code == 200
    found = response.json()
    parameters = count_parameters(spec["model"]["config"])
    assert (found["object"], found["valid"], found["parameters"]) == ("validation", True, parameters)
    assert (found["steps"], found["tokens"]) == (4, 4 * 32 * 64)
    assert found["resolved_spec"]["learning_rate"] == 3e-4
    assert set(found["pending"]) == {"memory", "disk", "time", "data", "vocabulary", "isolates"}
    for name in ("memory", "disk"):
        assert found[name] is None
        assert "No connected worker can check the spec" in found["pending"][name]
    assert found["time"] is None
    assert "no connected worker can run the job" in found["pending"]["time"]

    later = {**SPEC, "max_steps": None, "learning_rate": "find"}
    unknown = http.post("/v1/jobs/validate", json=later).json()
    for name in ("parameters", "trainable_parameters", "steps", "tokens", "memory", "disk", "time"):
        assert unknown[name] is None
        assert unknown["pending"][name].endswith(".")
    assert unknown["resolved_spec"]["learning_rate"] is None
    assert "Unknown until a range test before the first step" in unknown["pending"]["learning_rate"]

    job_id = rows.job()
    rows.attempt(job_id)
    rows.checkpoint(job_id, "step-4", 4, {"model.safetensors": ("weights", b"w")})
    rows.change(job_id, resolved_spec_json={**SPEC, "num_parameters": 1234, "files": {}})
    of_a_job = http.post("/v1/jobs/validate", json={**SPEC, "model": {"job": job_id, "checkpoint": "latest"}}).json()
    assert (of_a_job["parameters"], of_a_job["resolved_spec"]["model"]["checkpoint"]) == (1234, "step-4")
    assert [job["id"] for job in http.get("/v1/jobs").json()["data"] if job["id"] != job_id] == [
        job["id"] for job in before["data"]
    ]


def test_steps_of_epochs_come_from_an_earlier_job_on_the_same_data(rows: Rows, http: httpx.Client) -> None:
    ids = [
        http.post("/v1/files", files={"file": (name, text)}, data={"purpose": "dataset"}).json()["id"]
        for name, text in (("a.txt", b"same"), ("b.txt", b"same"), ("c.txt", b"other"), ("d.jsonl", b"same"))
    ]
    spec = {**SPEC, "dataset": {"file": ids[0]}, "max_steps": None, "epochs": 2, "batch_size": 8}
    earlier = http.post("/v1/jobs", json=spec).json()
    rows.change(earlier["id"], resolved_spec_json={**earlier["resolved_spec"], "data_report": {"sequences": 21}})

    def counted(**fields: Any) -> tuple[str | None, int | None, int | None]:
        found = http.post("/v1/jobs/validate", json={**spec, **fields}).json()
        assert ("steps" in found["pending"]) == ("tokens" in found["pending"]) == (found["steps"] is None)
        return found["counted_by"], found["steps"], found["tokens"]

    assert counted() == (earlier["id"], 6, 42 * 64)
    wider = {"config": {"model_type": "llama", "max_position_embeddings": 64, "hidden_size": 128}}
    same = {"dataset": {"file": ids[1]}, "model": wider, "tokenizer": {"builtin": "bytes"}, "seed": 7}
    assert counted(**same, epochs=0.5, batch_size=2) == (earlier["id"], 5, 10 * 64)
    others: list[dict[str, Any]] = [{"dataset": {"file": file_id}} for file_id in ids[2:]]
    others += [{"dataset": {"builtin": "python-docs"}}, {"dataset": {"file": ids[:2]}}]
    others += [{"chat_template": "{{ messages }}"}, {"seq_len": 32}, {"pack": False}, {"eval_split": 0.1}]
    for other in others:
        assert counted(**other) == (None, None, None), other


def test_validation_and_submission_report_the_same_errors(http: httpx.Client) -> None:
    for bad in ({**SPEC, "batch_size": 0}, {**SPEC, "dataset": {"file": "file_00000000000000000000"}}, {}, [1]):
        validated, submitted = http.post("/v1/jobs/validate", json=bad), http.post("/v1/jobs", json=bad)
        assert validated.status_code == submitted.status_code == 422
        assert error_of(validated) == error_of(submitted)
