"""The checks of a spec take time proportional to its size, and their errors stay short."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from zeta_core.contract.errors import ZetaError
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.validation import MAX_DETAILS, parse, shown

SPEC: dict[str, Any] = {
    "model": {"config": {"model_type": "llama"}},
    "dataset": {"builtin": "python-docs"},
    "max_steps": 4,
}
Fields = Callable[[int], Mapping[str, Any]]
# Each makes fields whose size grows with its number.
LARGE: dict[str, Fields] = {
    "unknown fields": lambda n: {f"learning_rat{i}": 1 for i in range(n)},
    "one long name": lambda n: {"learning_rate" * n: 1},
    "a long name over a list": lambda n: {"a" * n: [1] * n},
    "file ids that are none": lambda n: {"dataset": {"file": list(range(n))}},
    "file ids": lambda n: {"dataset": {"file": [f"file_{i:024d}" for i in range(n)]}},
    "empty sources": lambda n: {"dataset": [{} for _ in range(n)]},
    "misspelt sources": lambda n: {"dataset": [{"pth": "a"} for _ in range(n)]},
    "columns": lambda n: {"dataset": {"builtin": "python-docs", "columns": {f"tex{i}": "a" for i in range(n)}}},
    "names of no kind": lambda n: {"model": {f"confi{i}": 1 for i in range(n)}},
    "a deep model config": lambda n: {"model": {"config": {f"k{i}": [{}] for i in range(n)}}},
    "members of a union": lambda n: {"lora": {"target_modules": [1] * n}},
    "patterns": lambda n: {"freeze": [""] * n},
    "metadata": lambda n: {"metadata": {f"k{i}": 1 for i in range(n)}},
    "a long word for a choice": lambda n: {"optimizer": "adamw" * n},
    "an object for a choice": lambda n: {"optimizer": {f"adamw{i}": 1 for i in range(n)}},
    "a long Hub id": lambda n: {"model": "a." * n + "!"},
    "a long path": lambda n: {"dataset": {"path": "../" * n}},
    "a long checkpoint": lambda n: {"resume_from_checkpoint": "job_1/step-" + "1" * n},
    "a regular expression": lambda n: {"lora": {"target_modules": "(" * n + ")" * n}},
    "a DeepSpeed config": lambda n: {"use_deepspeed": {f"k{i}": 1 for i in range(n)}},
}


def check(fields: Mapping[str, Any]) -> float:
    """The seconds of processor time that the check of a spec with these fields takes, the fastest of three."""
    spec = {**SPEC, **fields}
    seconds: list[float] = []
    for _ in range(3):
        started = time.process_time()
        try:
            parse(JobSpec, spec)
        except ZetaError as error:
            body = error.body()
            assert 1 <= len(body.error.details) <= MAX_DETAILS
            assert len(body.model_dump_json()) < 64 * 1024, "the answer repeats the request"
        seconds.append(time.process_time() - started)
    return min(seconds)


@pytest.mark.parametrize("name", LARGE)
def test_the_time_of_a_check_grows_with_the_size_alone(name: str) -> None:
    """A quadratic check takes 100 times as long for 10 times the size; times below a millisecond are noise."""
    small, large = check(LARGE[name](2_000)), check(LARGE[name](20_000))
    assert large < 50 * max(small, 0.001), f"{small * 1000:.1f} ms became {large * 1000:.1f} ms"


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i)[\u0000-\uffff]" * 40,
        "(?i)[\U00010000-\U0010ffff]" * 30,
        "(a{1,1000}){1,1000}" * 50,
        "(" * 400 + ")" * 400,
    ],
)
def test_a_pattern_that_is_slow_to_compile_is_rejected_immediately(pattern: str) -> None:
    assert check({"lora": {"target_modules": pattern}}) < 2


def test_faults_beyond_the_limit_are_counted() -> None:
    with pytest.raises(ZetaError) as caught:
        parse(JobSpec, {**SPEC, **{f"x{i}": 1 for i in range(400)}})
    assert len(caught.value.details) == MAX_DETAILS
    assert f"(399 more: see details; the first {MAX_DETAILS} are listed)" in caught.value.message


def test_other_names_of_fields_are_recognized_among_many_faults() -> None:
    fields = {**{f"learning_rat{i}": 1 for i in range(30)}, "gradient_accumulation_steps": 2}
    with pytest.raises(ZetaError) as caught:
        parse(JobSpec, {**SPEC, **fields})
    suggestions = {detail.param: detail.suggestion for detail in caught.value.details}
    assert suggestions["learning_rat0"] == "learning_rate"
    assert suggestions["gradient_accumulation_steps"] == "gradient_accumulate_every"


@pytest.mark.parametrize(
    "value",
    [{"a": [1, 2.5, None, True, "x'y"], "b": {}}, [], [[]], "text", "", -1, 1e300, {"é": "\n"}],
)
def test_a_small_value_is_shown_whole(value: Any) -> None:
    assert shown(value) == repr(value)


@pytest.mark.parametrize("value", ["a" * 10**6, ["b"] * 10**6, {"c": ["d" * 10**6]}])
def test_a_large_value_is_shortened_without_formatting_all_of_it(value: Any) -> None:
    started = time.process_time()
    text = shown(value)
    assert text == repr(value)[:77] + "..."
    assert json.dumps(text)
    assert time.process_time() - started < 1
