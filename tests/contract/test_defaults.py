"""What an unset field means, as far as the spec alone can tell."""

from typing import Any

import pytest

from zeta_core.contract.defaults import resolve
from zeta_core.contract.spec import JobSpec
from zeta_core.contract.validation import parse

LLAMA = {"config": {"model_type": "llama", "max_position_embeddings": 256}}


def resolved(**fields: Any) -> dict[str, Any]:
    return resolve(parse(JobSpec, {"model": LLAMA, "dataset": {"builtin": "python-docs"}, **fields}))


def test_a_spec_that_says_nothing_is_one_epoch_of_32_sequences_split_by_the_device() -> None:
    found = resolved()
    assert (found["epochs"], found["max_steps"]) == (1.0, None)
    assert (found["global_batch_size"], found["batch_size"], found["gradient_accumulate_every"]) == (32, None, None)


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


def test_what_is_given_stays_as_it_is() -> None:
    found = resolved(max_steps=7, seq_len=100, seed=0, weight_decay=0, metadata={"a": "b"})
    assert (found["max_steps"], found["epochs"]) == (7, None)
    assert (found["seq_len"], found["seed"], found["weight_decay"], found["metadata"]) == (100, 0, 0, {"a": "b"})
    assert resolved(epochs=0.5)["epochs"] == 0.5


def test_the_sequence_length_is_the_configs_limit_up_to_a_bound_or_unknown() -> None:
    assert resolved()["seq_len"] == 256
    assert resolved(model={"config": {"model_type": "llama", "max_position_embeddings": 131072}})["seq_len"] == 1024
    assert resolved(model="org/name")["seq_len"] is None
