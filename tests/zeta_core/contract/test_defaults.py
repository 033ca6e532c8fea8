"""The defaults of unset fields, as far as the spec and the number of sequences determine them."""

from typing import Any

import pytest

from zeta_core.contract.spec.defaults import global_batch, packs, resolve
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import parse

LLAMA = {"config": {"model_type": "llama", "max_position_embeddings": 256}}


def resolved(**fields: Any) -> ResolvedSpec:
    return resolve(parse(JobSpec, {"model": LLAMA, "dataset": {"builtin": "python-docs"}, **fields}))


def test_training_from_scratch_is_one_epoch_with_a_global_batch_of_32() -> None:
    found = resolved()
    assert (found["epochs"], found["max_steps"]) == (1.0, None)
    assert (found["global_batch_size"], found["batch_size"], found["gradient_accumulate_every"]) == (32, None, None)


@pytest.mark.parametrize("model", ["org/name", {"job": "job_0123456789"}, {"file": "file_0123456789"}])
def test_fine_tuning_is_three_epochs_with_batches_that_depend_on_the_data(model: Any) -> None:
    found = resolved(model=model)
    assert found["epochs"] == 3.0
    assert (found["global_batch_size"], found["batch_size"], found["pack"]) == (None, None, None)
    found = resolved(model=model, batch_size=2, gradient_accumulate_every=3, pack=True)
    assert (found["global_batch_size"], found["batch_size"], found["pack"]) == (6, 2, True)


@pytest.mark.parametrize(("method", "rate"), [("dpo", 1e-6), ("kto", 1e-6), ("orpo", 8e-6)])
def test_preferences_are_learned_in_one_epoch_and_never_packed(method: str, rate: float) -> None:
    found = resolved(model="org/name", method=method, dataset={"file": "file_01m00000000000000000pairs"})
    assert (found["epochs"], found["pack"], found["learning_rate"]) == (1.0, False, rate)
    assert [name for name in ("dpo", "kto", "orpo") if found[name] is not None] == [method]


@pytest.mark.parametrize(
    ("num_sequences", "expected"), [(1, 1), (30, 1), (96, 2), (300, 5), (900, 16), (1500, 24), (3000, 32), (10**6, 32)]
)
def test_the_global_batch_of_a_fine_tuning_is_a_64th_of_the_sequences(num_sequences: int, expected: int) -> None:
    assert global_batch(num_sequences, 1, from_scratch=False) == expected
    assert global_batch(num_sequences, 1, from_scratch=True) == 32


def test_the_global_batch_is_a_multiple_of_the_processes() -> None:
    assert global_batch(30, 3, from_scratch=False) == 3
    assert global_batch(3000, 3, from_scratch=False) == 33


def test_fine_tuning_packs_unless_that_leaves_few_sequences() -> None:
    assert packs(64, 1000, from_scratch=False)
    assert not packs(63, 1000, from_scratch=False)
    assert packs(2, 2, from_scratch=False), "packing loses nothing"
    assert packs(2, 1000, from_scratch=True)


@pytest.mark.parametrize(
    ("fields", "batch_size", "accumulate", "global_batch"),
    [
        ({"batch_size": 4}, 4, 1, 4),
        ({"gradient_accumulate_every": 4}, 8, 4, 32),
        ({"gradient_accumulate_every": 100}, 1, 100, 100),
        ({"batch_size": 3, "gradient_accumulate_every": 5}, 3, 5, 15),
    ],
)
def test_one_batch_field_decides_the_other(
    fields: dict[str, int], batch_size: int, accumulate: int, global_batch: int
) -> None:
    found = resolved(**fields)
    assert (found["batch_size"], found["gradient_accumulate_every"]) == (batch_size, accumulate)
    assert found["global_batch_size"] == global_batch


def test_the_learning_rate_follows_what_is_trained() -> None:
    assert resolved()["learning_rate"] == 3e-4
    assert resolved(model="org/name")["learning_rate"] == 2e-5
    assert resolved(model={"builder": "name"})["learning_rate"] == 3e-4
    assert resolved(learning_rate=0.5)["learning_rate"] == 0.5
    assert resolved(learning_rate="find")["learning_rate"] is None


def test_given_values_are_kept() -> None:
    found = resolved(max_steps=7, seq_len=100, seed=0, weight_decay=0, metadata={"a": "b"})
    assert (found["max_steps"], found["epochs"]) == (7, None)
    assert (found["seq_len"], found["seed"], found["weight_decay"], found["metadata"]) == (100, 0, 0, {"a": "b"})
    assert resolved(epochs=0.5)["epochs"] == 0.5


def test_the_sequence_length_is_the_configs_limit_up_to_a_bound_or_unknown() -> None:
    assert resolved()["seq_len"] == 256
    assert resolved(model={"config": {"model_type": "llama", "max_position_embeddings": 131072}})["seq_len"] == 1024
    assert resolved(model="org/name")["seq_len"] is None
