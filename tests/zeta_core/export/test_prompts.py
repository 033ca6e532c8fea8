"""The prompts for comparing an export: beginnings of held-out documents, or fixed ones with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from zeta_core.data.sources import SourceLocations
from zeta_core.export.prompts import FIXED_PROMPTS, NUM_PROMPTS, Prompts, choose_prompts
from zeta_core.report.reporter import Reporter


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path.name


def conversation(number: int, question: str = "Which river has number {}?") -> dict[str, Any]:
    question = question.format(number)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"River {number}."}]}


def choose(folder: Path, tokenizer: Any, **held_out: Any) -> Prompts:
    locations = SourceLocations(data_root=folder)
    cache = folder / "cache"
    return choose_prompts(held_out or None, tokenizer, locations, cache, Reporter(), context_tokens=256)


def test_the_prompts_are_the_questions_of_the_evaluation_data(tmp_path: Path, tokenizer: Any) -> None:
    name = write(tmp_path / "chats.jsonl", [conversation(number) for number in range(100)])
    prompts = choose(tmp_path, tokenizer, dataset={"path": name})
    assert (prompts.source, prompts.reason, len(prompts.ids)) == ("eval_dataset", None, NUM_PROMPTS)
    assert len(set(prompts.names)) == NUM_PROMPTS
    assert prompts.text_ids == prompts.ids
    rows = [int(name.removeprefix("chats.jsonl, line ")) for name in prompts.names]
    assert max(rows) - min(rows) > 50, "they are spread over the file"
    for row, text in zip(rows, prompts.texts, strict=True):
        question = [conversation(row - 1)["messages"][0]]
        assert text == tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)


def test_the_prompts_are_from_the_part_that_eval_split_holds_out(tmp_path: Path, tokenizer: Any) -> None:
    name = write(tmp_path / "chats.jsonl", [conversation(number) for number in range(40)])
    split = {"dataset": {"path": name}, "eval_split": 0.1}
    first, again, other = (choose(tmp_path, tokenizer, **split, seed=seed) for seed in (1, 1, 2))
    assert (first.source, len(first.ids)) == ("eval_split", 4)
    assert first == again
    assert set(first.names) != set(other.names)


def test_a_text_is_continued_after_its_first_tokens(tmp_path: Path, tokenizer: Any) -> None:
    text = "The sea is wide, and nobody knows what lives in it. " * 40
    (tmp_path / "sea.txt").write_text(text)
    prompts = choose(tmp_path, tokenizer, dataset={"path": "sea.txt"})
    assert 2 <= len(prompts.ids) <= NUM_PROMPTS
    assert all(prompt in text for prompt in prompts.texts)


@pytest.mark.parametrize(
    ("held_out", "reason"),
    [
        ({}, "no held-out data"),
        ({"dataset": {"path": "missing.jsonl"}}, "missing.jsonl"),
        ({"dataset": {"path": "long.jsonl"}}, "no document with an answer after at most 128 tokens"),
        ({"dataset": {"unknown": 1}}, "can't be used"),
    ],
)
def test_fixed_prompts_have_a_reason(tmp_path: Path, tokenizer: Any, held_out: dict[str, Any], reason: str) -> None:
    write(tmp_path / "long.jsonl", [conversation(1, "Long " * 100)])
    prompts = choose(tmp_path, tokenizer, **held_out)
    assert (prompts.source, prompts.names) == ("fixed", FIXED_PROMPTS)
    assert prompts.reason is not None
    assert reason in prompts.reason
