"""Rows of token ids: masks, labels and padding are honoured, and columns that are not used are rejected or reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import ByT5Tokenizer

from tests.zeta_core.models import plain
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import LogLine, WarningLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.documents.conversations import TrainOn
from zeta_core.data.sequences import Sequences
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter

IDS = [10, 11, 12, 13, 14, 15]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(path: Path, table: Any) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


def tokens_of(path: Path, *, train_on: TrainOn | None = None, **source: Any) -> TokenFile:
    options = parse(TrainerOptions, {"dataset": {"path": str(path), "format": "tokens", **source}})
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    return prepare_tokens(sources, ByT5Tokenizer(), path.parent / "cache", Reporter(), train_on=train_on)


def trained_on(tokens: TokenFile) -> list[int]:
    """The ids that the run computes a loss for."""
    sequences = Sequences(tokens, 64, pack=True)
    labels = sequences.batch(np.arange(len(sequences)), len(sequences)).labels_BT.flatten().tolist()
    return [label for label in labels if label != -100]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"labels": [-100, -100, -100, 13, 14, 15]}, [13, 14, 15]),
        ({"labels": IDS}, IDS[1:]),
        ({"completion_mask": [0, 0, 0, 0, 1, 1]}, [14, 15]),
        ({"completion_mask": [False, False, True, True, False, True]}, [12, 13, 15]),
        ({"assistant_masks": [0, 1, 0, 1, 1, 0]}, [11, 13, 14]),
        ({"attention_mask": [1, 1, 1, 1, 0, 0]}, [11, 12, 13]),
        ({"attention_mask": [0, 0, 1, 1, 1, 1]}, [13, 14, 15]),
        ({"labels": [-100, 11, -100, 13, 14, 15], "attention_mask": [1, 1, 1, 1, 1, 0]}, [11, 13, 14]),
        ({"completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [0, 1, 1, 1, 0, 1]}, [12, 13, 15]),
        ({"labels": [-100, 11, 12, 13, 14, -100], "completion_mask": [0, 0, 0, 1, 1, 1]}, [13, 14]),
    ],
)
def test_only_tokens_that_every_column_allows_are_trained_on(
    columns: dict[str, Any], expected: list[int], suffix: str, tmp_path: Path
) -> None:
    tokens = tokens_of(write(tmp_path / f"rows{suffix}", [{"input_ids": IDS, **columns}] * 3))
    assert trained_on(tokens) == expected * 3


def test_padding_is_removed_from_both_ends(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [8, 9, 0, 0, 0], "attention_mask": [1, 1, 0, 0, 0]},
    ]
    tokens = tokens_of(write(tmp_path / "rows.jsonl", rows))
    assert (tokens.ids.tolist(), tokens.offsets.tolist()) == ([5, 6, 7, 8, 9], [0, 3, 5])
    assert (tokens.num_padding, tokens.supervised) == (5, None)


def test_rows_with_masked_prompts_are_not_cut_and_the_others_are(tmp_path: Path) -> None:
    masked = {"input_ids": IDS, "labels": [-100, -100, -100, 13, 14, 15]}
    for row, whole in ((masked, True), ({"input_ids": IDS, "labels": IDS}, False), ({"input_ids": IDS}, False)):
        tokens = tokens_of(write(tmp_path / "rows.jsonl", [row] * 3))
        assert tokens.has_whole_documents is whole
        sequences = Sequences(tokens, 8, pack=True)
        assert len(sequences) == (3 if whole else -(-18 // 8))


def test_a_column_can_be_named_as_a_mask(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"input_ids": IDS, "loss_mask": [0, 0, 0, 0, 1, 1]}])
    tokens = tokens_of(path, columns={"completion_mask": "loss_mask"})
    assert (trained_on(tokens), tokens.unused_columns) == ([14, 15], ())
    with pytest.raises(InvalidData, match=r"rows\.jsonl, line 1 has no 'loss', which columns names as 'completion_m"):
        tokens_of(path, columns={"completion_mask": "loss"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [10, 11, 12]}, r"'labels' has 3 values for 6 token ids"),
        ({"completion_mask": [1] * 7}, r"'completion_mask' has 7 values for 6 token ids"),
        ({"labels": [11, 12, 13, 14, 15, 2]}, r"'labels' contains 11 at position 0, where the token id is 10"),
        ({"labels": [-1, -1, -1, 13, 14, 15]}, r"'labels' contains -1 at position 0.*or -100"),
        ({"labels": None}, r"'labels' is null"),
        ({"labels": 3}, r"'labels' is a number"),
        ({"labels": [[1]] * 6}, r"'labels' is not a list of whole numbers"),
        ({"completion_mask": [0.5] * 6}, r"'completion_mask' is not a list of whole numbers"),
        ({"attention_mask": [1, 1, 2, 2, 3, 3]}, r"'attention_mask' contains 2; use 0 and 1"),
        ({"attention_mask": [1, 1, 0, 1, 1, 0]}, r"'attention_mask' is 0 at position 2, between tokens with 1"),
        ({"loss_mask": [0, 0, 1, 1, 1, 1]}, r"'loss_mask' looks like it marks the tokens to train on, but is not used"),
        ({"assistant_mask": [0, 0, 1]}, r"'assistant_mask' looks like"),
        ({"target_ids": [11, 12, 13, 14, 15, 1]}, r"'target_ids' looks like"),
        ({"segments": [0, 0, 0, 1, 1, 1]}, r"'segments' looks like"),
        ({"token_weights": [0.5] * 6}, r"'token_weights' looks like"),
        ({"prompt_length": 3}, r"'prompt_length' looks like"),
        ({"weight": 0.0}, r"'weight' looks like"),
    ],
)
def test_a_wrong_or_unknown_mask_is_rejected_with_its_row(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [{"input_ids": IDS}, {"input_ids": IDS, **row}]
    with pytest.raises(InvalidData, match=r"rows\.jsonl, line 2:? " + message):
        tokens_of(write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".csv"])
@pytest.mark.parametrize("column", ["loss_mask", "segments"])
def test_a_table_with_an_unknown_mask_is_rejected(column: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text(f'input_ids,{column}\n"{IDS}","[0, 0, 1, 1, 1, 1]"\n')
    else:
        write_table(path, pa.table({"input_ids": [IDS], column: [[0, 0, 1, 1, 1, 1]]}))
    with pytest.raises(InvalidData, match=rf"rows\{suffix}, row 1: '{column}' looks like"):
        tokens_of(path)


# Values that pyarrow stores, and that Python cannot represent.
NOT_UTF8 = pa.array([b"\xff\xfe", b"\xff"]).view(pa.string())
YEAR_300000 = pa.array([300_000 * 31_556_952, 0]).cast(pa.timestamp("s"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("values", [NOT_UTF8, YEAR_300000], ids=["text", "date"])
@pytest.mark.parametrize("column", ["url", "prompt", "completion"])
def test_values_of_other_columns_are_never_read(column: str, values: Any, suffix: str, tmp_path: Path) -> None:
    ids, labels = pa.array([IDS, IDS]), pa.array([[-100, *IDS[1:]]] * 2)
    path = tmp_path / f"rows{suffix}"
    write_table(path, pa.table({"input_ids": ids, column: values, "labels": labels}))
    tokens = tokens_of(path)
    assert (tokens.ids.tolist(), tokens.masks, tokens.unused_columns) == (IDS * 2, ("labels",), (column,))
    named = pa.table({"ids": ids, column: values, "mask": pa.array([[0, 1, 1, 1, 1, 1]] * 2)})
    write_table(path, named)
    assert trained_on(tokens_of(path, columns={"input_ids": "ids", "completion_mask": "mask"})) == IDS[1:] * 2


def test_a_damaged_page_of_another_column_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"input_ids": [IDS] * 50, "url": [f"https://example.org/{number}" for number in range(50)]})
    parquet.write_table(table, path, compression="gzip", use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(content)
    assert tokens_of(path).num_documents == 50


def test_another_column_may_contain_values_of_any_type(tmp_path: Path) -> None:
    others: list[Any] = ["text", 3, None, {"a": [1]}, [1, "b"], [[1, 2]], True, 2.5, [7, 8], "[0, 1]"]
    path = write(tmp_path / "rows.jsonl", [{"input_ids": IDS, "note": other} for other in others])
    with path.open("a") as file:
        file.write('{"input_ids": [1, 2], "note": "\\ud800"}\n')
    tokens = tokens_of(path)
    assert (tokens.num_documents, tokens.unused_columns) == (len(others) + 1, ("note",))


def test_a_mask_of_some_rows_only_is_rejected(tmp_path: Path) -> None:
    rows = [{"input_ids": IDS, "completion_mask": [1] * 6}] * 2 + [{"input_ids": IDS}]
    with pytest.raises(InvalidData, match=r"rows\.jsonl, line 3 has no 'completion_mask', which other rows have"):
        tokens_of(write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("train_on", "columns", "message"),
    [
        ("assistant", {}, r"has no 'assistant_masks', and train_on is 'assistant'\."),
        ("completion", {}, r"has no 'completion_mask', and train_on is 'completion'"),
        ("assistant", {"labels": IDS}, r"has no 'assistant_masks'.*; labels determine what is trained on"),
        ("all", {"labels": [-100, -100, 12, 13, 14, 15]}, r"'labels' excludes tokens, but train_on is 'all'"),
    ],
)
def test_train_on_must_not_contradict_the_columns(
    train_on: TrainOn, columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidData, match=r"rows\.jsonl, line 1:? .*" + message):
        tokens_of(write(tmp_path / "rows.jsonl", [{"input_ids": IDS, **columns}]), train_on=train_on)


def test_train_on_may_name_a_mask_that_is_present(tmp_path: Path) -> None:
    row = {"input_ids": IDS, "assistant_masks": [0, 0, 0, 0, 1, 1], "completion_mask": [0, 0, 0, 1, 1, 1]}
    path = write(tmp_path / "rows.jsonl", [row])
    assert trained_on(tokens_of(path, train_on="assistant")) == [14, 15]
    assert trained_on(tokens_of(write(path, [{"input_ids": IDS, "labels": IDS}]), train_on="all")) == IDS[1:]


def test_the_data_report_states_what_was_used_and_what_was_not(tmp_path: Path) -> None:
    rows = [
        {
            "input_ids": [*IDS, 0, 0],
            "attention_mask": [1] * 6 + [0] * 2,
            "labels": [-100, -100, -100, 13, 14, 15, -100, -100],
            "position_ids": list(range(8)),
            "length": 8,
            "source": "web",
        }
    ] * 4
    rows.append({**rows[0], "labels": [-100] * 8})
    path = write(tmp_path / "rows.jsonl", rows)
    _, lines = train(plain(), tmp_path / "out", cache=tmp_path, max_steps=1, dataset={"path": str(path)},
                     use_pretokenized=True)  # fmt: skip
    data = lines.resolved_spec["data_report"]
    assert (data["documents"], data["tokens"], data["untrained"], data["padding_tokens"]) == (4, 24, 1, 10)
    assert data["supervised_share"] == 0.5
    assert data["masks"] == ["labels", "attention_mask"]
    assert data["unused_columns"] == ["position_ids", "length", "source"]
    assert lines.resolved_spec["train_on"] == "labels and attention_mask"
    warnings = {line.code: line.message for line in lines.all if isinstance(line, WarningLine)}
    assert warnings["rows_not_trained_on"].startswith("1 row is omitted")
    logged = [line.message for line in lines.all if isinstance(line, LogLine)]
    assert "Columns of the data that are not used: position_ids, length, source." in logged


@pytest.mark.parametrize(
    "columns", [{"labels": [-100] * 6}, {"completion_mask": [1, 0, 0, 0, 0, 0]}, {"attention_mask": [0] * 6}]
)
def test_data_without_any_trained_token_is_rejected(columns: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"rows\.jsonl: no token is trained on in any of the 2 rows"):
        tokens_of(write(tmp_path / "rows.jsonl", [{"input_ids": IDS, **columns}] * 2))
