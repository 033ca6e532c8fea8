"""Well-known shapes of rows are read; unused columns are reported, or rejected if they belong to the prompt."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from zeta.spec_file import apply_settings
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter

USER, ANSWER = "Which river is the longest?", "The Nile, at 6,650 km."
TURNS = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]


def tokens_of(rows: list[dict[str, Any]] | Path, folder: Path, method: str = "sft", **source: Any) -> TokenFile:
    path = rows if isinstance(rows, Path) else folder / "rows.jsonl"
    if not isinstance(rows, Path):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = parse(TrainerOptions, {"dataset": {"path": str(path), **source}})
    sources = open_sources(
        dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False, method=method
    )
    return prepare_tokens(sources, byte_tokenizer(CHATML), folder / "cache", Reporter(), method=method)


def texts_of(tokens: TokenFile) -> list[str]:
    tokenizer = byte_tokenizer(CHATML)
    bounds = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [str(tokenizer.decode(np.asarray(tokens.ids[a:b]).tolist())) for a, b in bounds]


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


PLAIN = chatml(("user", USER), ("assistant", ANSWER))
SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"instruction": USER, "input": "", "output": ANSWER}, PLAIN),
    (
        {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day", "system": "Be brief."},
        chatml(("system", "Be brief."), ("user", "Translate.\nGuten Tag"), ("assistant", "Good day")),
    ),
    (
        {"instruction": USER, "output": ANSWER, "history": [["Hi", "Hello"]]},
        chatml(("user", "Hi"), ("assistant", "Hello"), ("user", USER), ("assistant", ANSWER)),
    ),
    ({"question": USER, "answer": ANSWER}, PLAIN),
    ({"Question": USER, "Response": ANSWER}, PLAIN),
    (
        {"id": "t0.1", "system_prompt": "Think.", "question": USER, "response": ANSWER},
        chatml(("system", "Think."), ("user", USER), ("assistant", ANSWER)),
    ),
    ({"query": USER, "response": ANSWER, "type": "GSM"}, PLAIN),
    ({"problem": USER, "solution": ANSWER}, PLAIN),
    ({"instruction": USER, "response": ANSWER}, PLAIN),
    ({"prompt": USER, "response": ANSWER}, PLAIN),
    ({"inputs": USER, "targets": ANSWER}, PLAIN),
    ({"input": USER, "output": ANSWER}, PLAIN),
]


@pytest.mark.parametrize(("row", "text"), SHAPES)
def test_a_well_known_shape_is_trained_on_as_a_conversation(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    tokens = tokens_of([row, row], tmp_path)
    assert texts_of(tokens)[0] == text
    assert tokens.origins[0].shape
    assert tokens.supervised is not None
    learned = byte_tokenizer(CHATML).decode(np.asarray(tokens.ids[tokens.supervised]).tolist())
    answers = "".join(re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n?)", text))
    assert learned == answers * 2


CHOSEN = [{"role": "assistant", "content": ANSWER}]
REJECTED = [{"role": "assistant", "content": "The Rhine."}]
PROMPT = {"role": "user", "content": USER}
PREFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"question": USER, "chosen": ANSWER, "rejected": "The Rhine."}, PLAIN),
    (
        {"system": "Be exact.", "question": USER, "chosen": ANSWER, "rejected": "The Rhine."},
        chatml(("system", "Be exact."), ("user", USER), ("assistant", ANSWER)),
    ),
    ({"instruction": USER, "input": "", "chosen": ANSWER, "rejected": "The Rhine."}, PLAIN),
    ({"input": {"messages": [PROMPT]}, "preferred_output": CHOSEN, "non_preferred_output": REJECTED}, PLAIN),
    (
        {
            "prompt": USER,
            "chosen": [PROMPT, *CHOSEN],
            "rejected": [PROMPT, *REJECTED],
            "messages": [PROMPT, *CHOSEN],
            "score_chosen": 8.0,
        },
        PLAIN,
    ),
]


@pytest.mark.parametrize(("row", "text"), PREFERENCES)
def test_preference_rows_of_every_shape_keep_their_prompt(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    tokens = tokens_of([row], tmp_path, "dpo")
    assert texts_of(tokens) == [text, text.replace(ANSWER, "The Rhine.")]


PAIR = {"prompt": "Q", "completion": "A"}
CHAT = {"messages": [PROMPT, *CHOSEN]}
DPO = {"chosen": "Yes.", "rejected": "No."}
LOST: list[tuple[dict[str, Any], str, dict[str, Any], str, str]] = [
    ({**PAIR, "system": "Be brief."}, "sft", {}, "system", "dataset.drop_columns=[system]"),
    ({**CHAT, "system_prompt": "Be brief."}, "sft", {}, "system_prompt", "dataset.columns.system=system_prompt"),
    ({**CHAT, "chat_history": [["a", "b"]]}, "sft", {}, "chat_history", "dataset.drop_columns=[chat_history]"),
    ({**DPO, "user_query": USER}, "dpo", {}, "user_query", "dataset.columns.prompt=user_query"),
    ({**DPO, "prompt": "Q", "system": "Be brief."}, "dpo", {}, "system", "dataset.drop_columns=[system]"),
    ({"text": "A poem.", "Instruction": "Write a poem."}, "sft", {}, "Instruction", "drop_columns=[Instruction]"),
    ({**PAIR, "label": False}, "sft", {}, "label", "dataset.drop_columns=[label]"),
    ({**CHAT, "loss_mask": [0, 1]}, "sft", {}, "loss_mask", "dataset.drop_columns=[loss_mask]"),
    ({"question": "Q", "answer": "A", "context": "A text."}, "sft", {}, "context", "dataset.drop_columns=[context]"),
    (
        {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"},
        "sft",
        {"columns": {"prompt": "instruction", "completion": "output"}},
        "input",
        "dataset.drop_columns=[input]",
    ),
]


@pytest.mark.parametrize(("row", "method", "source", "column", "fix"), LOST)
def test_a_lost_part_of_the_prompt_is_an_error_with_a_cure(
    row: dict[str, Any], method: str, source: dict[str, Any], column: str, fix: str, tmp_path: Path
) -> None:
    good = {name: value for name, value in row.items() if name != column}
    with pytest.raises(InvalidData, match="line 2 has the column") as caught:
        tokens_of([good, row], tmp_path, method, **source)
    assert caught.value.code == "unused_column"
    message = str(caught.value)
    assert f"{column!r}" in message
    setting = f"--set '{fix}'" if fix.startswith("dataset.") else fix
    assert setting in message
    # The printed fix works, also for a dataset given as a path.
    pasted = message.split("--set '")[1].split("'")[0]
    changed = apply_settings({"dataset": "rows.jsonl"}, [pasted])["dataset"]
    assert changed.pop("file") == "rows.jsonl"
    columns = {**source.get("columns", {}), **changed.pop("columns", {})}
    assert tokens_of([row, row], tmp_path, method, columns=columns, **changed).num_documents >= 2


def test_all_columns_of_a_shape_are_used_with_the_printed_settings(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
    with pytest.raises(InvalidData) as caught:
        tokens_of([row], tmp_path, columns={"prompt": "instruction", "completion": "output"})
    settings = re.findall(r"--set '([^']*)'", str(caught.value).split(", or ")[-1])
    changed = apply_settings({"dataset": {"columns": {"prompt": "instruction"}}}, settings)["dataset"]
    assert "Guten Tag" in texts_of(tokens_of([row], tmp_path, **changed))[0]


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "system": "", "history": [], "input": None},
        {"text": "Q: Why?\nA: Because.", "question": "Why?", "answer": "Because."},
        {**CHAT, "prompt": USER, "prompt_id": "8a"},
        {"text": "a review", "label": 1},
    ],
)
def test_empty_and_repeated_columns_are_not_lost(row: dict[str, Any], tmp_path: Path) -> None:
    assert tokens_of([row, row], tmp_path).num_documents == 2


def test_a_dropped_column_that_no_row_has_is_rejected(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "system": "Be brief."}]
    assert tokens_of(rows, tmp_path, drop_columns=["system"]).unused_columns == ("system",)
    with pytest.raises(InvalidData, match=r"dataset\.drop_columns names 'sytem', which no row has"):
        tokens_of(rows, tmp_path, drop_columns=["system", "sytem"])


@pytest.mark.parametrize(
    ("row", "columns", "column"),
    [
        ({"messages": TURNS}, {"system": "sytem"}, "sytem"),
        ({"instruction": "Add.", "output": "4", "sys": "Be brief."}, {"system": "sys"}, "sys"),
    ],
)
def test_a_mapped_column_without_effect_is_rejected(
    row: dict[str, Any], columns: dict[str, str], column: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidData, match=rf"dataset\.columns names '{column}' as 'system', but no row has"):
        tokens_of([row], tmp_path, columns=columns)


def test_a_json_file_may_contain_one_row_of_a_known_shape(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"instruction": USER, "output": ANSWER}))
    assert texts_of(tokens_of(tmp_path / "one.json", tmp_path)) == [PLAIN]


def test_an_optional_column_may_be_missing_in_some_rows(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS, "sys": "Be brief."}]
    assert tokens_of(rows, tmp_path, columns={"system": "sys"}).num_documents == 2


def test_columns_of_text_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one two three")
    options: list[dict[str, Any]] = [{"columns": {"text": "body"}}, {"drop_columns": ["id"]}]
    for option in options:
        with pytest.raises(InvalidData, match=r"dataset\.(drop_)?columns is given, but the data has no columns"):
            tokens_of(tmp_path / "notes.txt", tmp_path, **option)


def test_other_columns_are_named_once(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": 2, "source": "web"}, {"text": "three", "score": None}]
    assert tokens_of(rows, tmp_path).unused_columns == ("id", "source", "score")
    parquet.write_table(pa.table({"text": ["one", "two"], "url": ["a", "b"]}), tmp_path / "t.parquet")
    assert tokens_of(tmp_path / "t.parquet", tmp_path).unused_columns == ("url",)


def test_a_bad_value_in_a_column_that_is_not_needed_is_never_read(tmp_path: Path) -> None:
    text = pa.array([b"\xff\xfe", b"\xff"]).view(pa.string())
    table = pa.Table.from_arrays([pa.array(["one", "two"]), text], names=["text", "url"])
    parquet.write_table(table, tmp_path / "bad.parquet")
    with pa.OSFile(str(tmp_path / "bad.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "bad.jsonl").write_text('{"text": "one", "url": "\\ud800"}\n{"text": "two"}\n')
    for name in ("bad.parquet", "bad.arrow", "file.arrow", "bad.jsonl"):
        assert texts_of(tokens_of(tmp_path / name, tmp_path)) == ["one<|end|>", "two<|end|>"]


def test_rows_of_no_known_format_name_what_was_found_and_expected(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no usable columns \(found: body, id\)\. Expected text, messages") as caught:
        tokens_of([{"body": "words", "id": 3}] * 2, tmp_path)
    assert "--set 'dataset.columns.text=body'" in str(caught.value)
    parquet.write_table(pa.table({"body": ["words"]}), tmp_path / "t.parquet")
    with pytest.raises(InvalidData, match=r"row 1: no usable columns \(found: body\)"):
        tokens_of(tmp_path / "t.parquet", tmp_path)


def test_conversations_in_csv_are_json_text(tmp_path: Path) -> None:
    with (tmp_path / "chat.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages", "id"], [json.dumps(CHAT["messages"]), "1"]])
    assert texts_of(tokens_of(tmp_path / "chat.csv", tmp_path)) == [PLAIN]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": USER, "output": 3}, "'output' is a number; it must be text"),
        ({"instruction": USER, "output": " "}, "'output' is empty"),
        ({"instruction": USER, "output": ANSWER, "history": ["Hi"]}, r"'history' that is not a list of pairs"),
        ({"instruction": USER, "output": None}, "has no 'output', which Alpaca rows have"),
    ],
)
def test_a_wrong_value_in_a_shape_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"instruction": USER, "input": "", "output": ANSWER}
    with pytest.raises(InvalidData, match=f"line 2:? .*{message}"):
        tokens_of([good, row], tmp_path)
