"""Held-out data shares no row, no copy of a row, and no group with the training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import ByT5Tokenizer

from tests.zeta_core.data.token_files import random_documents, token_file
from tests.zeta_core.models import plain
from tests.zeta_core.runs import train
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.job.events import LogLine, WarningLine
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import Mix, Origin, TokenFile, prepare_tokens
from zeta_core.data.tokens.held_out import hold_out, num_shared
from zeta_core.failures import CannotResume, InvalidData
from zeta_core.report.reporter import Reporter

# Like the template of Qwen 3, it omits the thinking of earlier turns, so every turn becomes a document.
FORGETS_THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}"
    "({{ m.reasoning_content }}){% endif %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def conversation(name: str, num_turns: int = 3) -> dict[str, Any]:
    turns: list[dict[str, str]] = []
    for turn in range(num_turns):
        turns.append({"role": "user", "content": f"{name} asks {turn}"})
        answer = {"role": "assistant", "content": f"{name} hears {turn}", "reasoning_content": f"thought {turn}"}
        turns.append(answer)
    return {"messages": turns}


def tokens_of(
    path: Path, rows: Sequence[dict[str, Any]], *, group_by: str | None = None, method: str = "sft", processes: int = 1
) -> TokenFile:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = parse(TrainerOptions, {"dataset": {"path": str(path)}})
    locations = SourceLocations(any_path=True)
    sources = open_sources(dataset_sources(options.dataset), locations, pretokenized=False, method=method)
    sources = [replace(source, group_by=group_by) for source in sources]
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = FORGETS_THINKING
    cache = path.parent / f"cache-{processes}"
    return prepare_tokens(sources, tokenizer, cache, Reporter(), method=method, processes=processes)


def texts(tokens: TokenFile) -> list[tuple[int, ...]]:
    spans = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tuple(tokens.ids[tokens.where(np.arange(a, b))].tolist()) for a, b in spans]


def rows_of(tokens: TokenFile) -> set[int]:
    assert tokens.rows is not None
    return set(tokens.rows.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_conversations_are_held_out_as_a_whole(seed: int, tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path / "chats.jsonl", [conversation(f"n{number}") for number in range(10)])
    assert tokens.num_documents == 30
    split = hold_out(tokens, 0.2, seed)
    assert (len(rows_of(split.held_out)), len(rows_of(split.train))) == (2, 8)
    assert not rows_of(split.held_out) & rows_of(split.train)
    assert split.held_out.num_documents == 6


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_row_are_on_the_same_side(seed: int, tmp_path: Path) -> None:
    rows = [{"text": f"text number {number % 10}"} for number in range(20)]
    split = hold_out(tokens_of(tmp_path / "rows.jsonl", rows), 0.2, seed)
    assert not set(texts(split.held_out)) & set(texts(split.train))
    assert (split.held_out.num_documents, split.train.num_documents) == (4, 16)
    assert split.overlap.num_duplicates == 2


def test_copies_of_conversations_and_pairs_are_on_the_same_side(tmp_path: Path) -> None:
    chats = [conversation(f"n{number % 5}", 2) for number in range(10)]
    pairs = [{"prompt": f"q{n % 5}", "chosen": f"yes {n % 5}", "rejected": "no"} for n in range(10)]
    for name, rows, method in (("chats", chats, "sft"), ("pairs", pairs, "dpo")):
        split = hold_out(tokens_of(tmp_path / f"{name}.jsonl", rows, method=method), 0.2, seed=1)
        assert (len(rows_of(split.held_out)), split.overlap.num_duplicates) == (2, 1)
        chosen_and_context = texts(split.held_out)[0::2], texts(split.train)[0::2]
        assert not set(chosen_and_context[0]) & set(chosen_and_context[1])
        assert split.held_out.num_documents == 4


def test_a_turn_that_is_also_trained_on_is_not_evaluated(tmp_path: Path) -> None:
    greeting = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "reasoning_content": "-"}]
    rows = [{"messages": [*greeting, *conversation(f"n{number}", 1)["messages"]]} for number in range(10)]
    split = hold_out(tokens_of(tmp_path / "chats.jsonl", rows), 0.2, seed=1)
    assert (split.train.num_documents, split.held_out.num_documents, split.overlap.num_removed) == (16, 2, 2)
    assert not set(texts(split.held_out)) & set(texts(split.train))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_held_out_as_a_whole(seed: int, suffix: str, tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "patient": f"p{number % 8}"} for number in range(40)]
    tokens = tokens_of(tmp_path / f"rows{suffix}", rows, group_by="patient")
    split = hold_out(tokens, 0.3, seed)
    held, trained = ({(row - 1) % 8 for row in rows_of(part)} for part in (split.held_out, split.train))
    assert not held & trained
    assert len(held) == 2  # 10 of the 12 rows that 0.3 allows
    assert tokens.unused_columns == ()


def test_copies_connect_groups(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "group": number // 2} for number in range(20)]
    rows[3]["text"] = rows[0]["text"]  # connects groups 0 and 1
    rows[5]["text"] = rows[2]["text"]  # and group 2
    tokens = tokens_of(tmp_path / "rows.jsonl", rows, group_by="group")
    for seed in range(20):
        held = rows_of(hold_out(tokens, 0.4, seed).held_out)
        assert held & set(range(1, 7)) in (set(), set(range(1, 7)))
        assert all((row in held) == (row + 1 in held) for row in range(1, 20, 2))


@pytest.mark.parametrize("value", [None, "", ["a"], "absent"])
def test_a_row_without_its_group_is_rejected(value: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "one", "group": "a"}, {"text": "two", "group": value}]
    if value == "absent":
        del rows[1]["group"]
    with pytest.raises(InvalidData, match=r"rows\.jsonl, line 2 has no text or number in 'group', which gr"):
        tokens_of(tmp_path / "rows.jsonl", rows, group_by="group")


def test_a_single_group_cannot_be_divided(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "group": 1} for number in range(10)]
    with pytest.raises(InvalidData, match="10 rows cannot be divided, because they have the same value of group_by"):
        hold_out(tokens_of(tmp_path / "rows.jsonl", rows, group_by="group"), 0.2, seed=1)
    with pytest.raises(InvalidData, match="the 10 rows cannot be divided, because they have the same content"):
        hold_out(tokens_of(tmp_path / "rows.jsonl", [{"text": "again"}] * 10), 0.2, seed=1)


def test_the_end_of_a_text_is_held_out_of_all_its_copies() -> None:
    long = random_documents([200]).ids.tolist()
    split = hold_out(token_file(long, [5, 6, 7], long), 0.1, seed=1)
    held = texts(split.held_out)[0]
    assert held == tuple(long[-len(held) :])
    assert [len(text) for text in texts(split.train)] == [200 - len(held), 3, 200 - len(held)]


def test_weighted_sources_share_no_copies_and_no_groups() -> None:
    documents = [[10 + number, 11, 12] for number in range(10)]
    tokens = token_file(*documents, *documents)
    tokens = replace(tokens, origins=tuple(Origin(name, "line", "text", 10) for name in "ab"))
    tokens = tokens.mixed(Mix((0.5, 0.5), (0, 1)))
    for seed in range(10):
        split = hold_out(tokens, 0.2, seed)
        assert not set(texts(split.held_out)) & set(texts(split.train))
        assert np.diff(split.held_out.source_bounds).tolist() == [2, 2]


def test_the_split_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    rows = [{"text": f"text {number % 900} " + "word " * 500, "group": number % 300} for number in range(2000)]
    splits = [
        hold_out(tokens_of(tmp_path / "rows.jsonl", rows, group_by="group", processes=processes), 0.1, seed=3)
        for processes in (1, 2)
    ]
    assert rows_of(splits[0].held_out) == rows_of(splits[1].held_out)
    assert splits[0].held_out.fingerprint == splits[1].held_out.fingerprint


def test_copies_between_training_and_evaluation_data_are_counted(tmp_path: Path) -> None:
    trained = tokens_of(tmp_path / "a.jsonl", [{"text": f"text {number}"} for number in range(10)])
    held_out = tokens_of(tmp_path / "b.jsonl", [{"text": f"text {number}"} for number in range(7, 20)])
    assert (num_shared(trained, held_out), num_shared(held_out, trained)) == (3, 3)
    options: dict[str, Any] = {"dataset": {"path": str(tmp_path / "a.jsonl")}, "max_steps": 1}
    options["eval_dataset"] = {"path": str(tmp_path / "b.jsonl")}
    _, lines = train(plain(), tmp_path / "out", cache=tmp_path, **options)
    warned = {line.code: line.message for line in lines.all if isinstance(line, WarningLine)}
    assert warned["evaluated_on_training_data"].startswith("eval_dataset contains 3 exact copies")


@pytest.mark.extended
def test_a_resumed_run_keeps_its_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"some text of number {number}", "group": number % 5, "other": number} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"dataset": {"path": str(path)}, "eval_split": 0.2, "max_steps": 4, "cache": tmp_path}
    looks = count()

    def pause() -> StopAction | None:
        return "pause" if next(looks) >= 2 else None

    stopped, lines = train(plain(), tmp_path / "out", group_by="group", stop=pause, **options)
    assert stopped.stopped == "pause"
    assert lines.resolved_spec["group_by"] == "group"
    assert any(isinstance(line, LogLine) and line.message == "Held out by eval_split: 8 rows." for line in lines.all)
    with pytest.raises(CannotResume, match="group_by is 'other'"):
        train(plain(), tmp_path / "out", resume=True, group_by="other", **options)
    outcome, lines = train(plain(), tmp_path / "out", resume=True, **options)
    assert outcome.progress.step == 4
    assert lines.resolved_spec["group_by"] == "group"


def test_group_by_needs_a_split_and_columns(tmp_path: Path) -> None:
    for options in ({}, {"eval_dataset": {"path": "b.jsonl"}}):
        with pytest.raises(InvalidSpec, match="group_by is 'group'; it has no effect without eval_split"):
            parse(TrainerOptions, {"group_by": "group", "dataset": {"path": "a.jsonl"}, **options})
    np.save(tmp_path / "ids.npy", np.arange(50))
    with pytest.raises(InvalidData, match="group_by names a column, but flat files of ids have none"):
        train(plain(), tmp_path / "out", cache=tmp_path, dataset={"path": str(tmp_path / "ids.npy")}, group_by="group",
              eval_split=0.2, use_pretokenized=True)  # fmt: skip
