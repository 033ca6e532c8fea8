"""Data is tokenized once, by several processes, in its order, and cache entries are complete."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import ByT5Tokenizer

from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.runs import RecordedLines
from zeta_core.contract.job.events import LogLine, ProgressLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.rows import text_files
from zeta_core.data.rows.row import Row
from zeta_core.data.sandbox import Position
from zeta_core.data.sources import Source, SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, encoder, parallel_encoding, prepare_tokens
from zeta_core.failures import InvalidData, TrainingFailed
from zeta_core.report.reporter import Reporter

NUM_ROWS = 2_400


def sources_of(*paths: Path) -> list[Source]:
    options = parse(TrainerOptions, {"dataset": [{"path": str(path)} for path in paths]})
    return open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)


def prepare(paths: list[Path], cache: Path, *, processes: int, tokenizer: Any = None, **more: Any) -> TokenFile:
    tokenizer = tokenizer or byte_tokenizer(chat_templates.CHATML)
    return prepare_tokens(sources_of(*paths), tokenizer, cache, Reporter(), processes=processes, **more)


@pytest.fixture(scope="module")
def several_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """About a megabyte of data: conversations as JSON Lines, a long text, and a table."""
    folder = tmp_path_factory.mktemp("sources")
    with (folder / "chat.jsonl").open("w") as file:
        for number in range(NUM_ROWS):
            turns = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "x" * 90}]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "text.txt").write_text("".join(f"Line {number} of a long text.\n" for number in range(10_000)))
    parquet.write_table(pa.table({"text": [f"Row {n} " * 9 for n in range(2_000)]}), folder / "table.parquet")
    return [folder / name for name in ("chat.jsonl", "text.txt", "table.parquet")]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small units, so that little data is read like large data."""
    monkeypatch.setattr("zeta_core.data.rows.text_files.UNIT_BYTES", 1 << 15)
    monkeypatch.setattr(parallel_encoding, "BYTES_PER_PROCESS", 1 << 15)
    monkeypatch.setattr(parallel_encoding, "_cores", lambda: 3)


def test_several_processes_create_the_same_tokens_as_one(several_sources: list[Path], tmp_path: Path) -> None:
    alone = prepare(several_sources, tmp_path / "alone", processes=1)
    together = prepare(several_sources, tmp_path / "together", processes=3)
    assert (together.num_documents, together.num_tokens) == (NUM_ROWS + 1 + 2_000, alone.num_tokens)
    for name in ("ids", "offsets", "rows", "supervised"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert (alone.origins, alone.num_duplicates) == (together.origins, together.num_duplicates)
    assert together.location(NUM_ROWS - 1) == f"chat.jsonl, line {NUM_ROWS}"
    assert together.location(NUM_ROWS) == "text.txt"


def test_the_first_fault_in_the_data_is_reported(several_sources: list[Path], tmp_path: Path) -> None:
    lines = several_sources[0].read_bytes().splitlines(keepends=True)
    for number in (1_100, 2_200, 2_399):
        lines[number] = b"not json\n"
    (tmp_path / "bad.jsonl").write_bytes(b"".join(lines))
    for processes in (1, 3):
        with pytest.raises(InvalidData, match=r"bad\.jsonl, line 1101 is not valid JSON"):
            prepare([tmp_path / "bad.jsonl"], tmp_path / "cache", processes=processes)


def test_a_killed_process_is_reported_and_leaves_nothing_in_the_cache(
    several_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = os.getpid()
    whole = encoder.Encoder.encode

    def killed(self: Any, source: Source, rows: Any, position: Position) -> Any:
        made = whole(self, source, rows, position)
        if os.getpid() != ours and made.rows_D[0] > 1_000:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(encoder.Encoder, "encode", killed)
        with pytest.raises(TrainingFailed, match="A tokenization process exited with code -9"):
            prepare(several_sources, tmp_path, processes=2)
    assert not list(tmp_path.glob("tokens-*/meta.json"))
    assert prepare(several_sources[:1], tmp_path, processes=2).num_documents == NUM_ROWS


def test_progress_reports_the_documents_and_the_completed_share(several_sources: list[Path], tmp_path: Path) -> None:
    recorded = RecordedLines()
    report = Reporter(recorded)
    tokenizer = byte_tokenizer(chat_templates.CHATML)
    tokens = prepare_tokens(sources_of(*several_sources), tokenizer, tmp_path, report, seconds_between_lines=0.0)
    lines = [line for line in recorded.all if isinstance(line, ProgressLine)]
    shares = [line.share or 0 for line in lines]
    assert len(lines) > 5
    assert shares == sorted(shares)
    assert {line.phase for line in lines} == {"loading_data"}
    assert (lines[-1].documents, shares[-1]) == (tokens.num_documents, 1.0)
    recorded.all.clear()
    prepare_tokens(sources_of(*several_sources), tokenizer, tmp_path, report)
    assert recorded.all == [], "the second run finds the cached tokens"


@pytest.mark.parametrize("damage", ["tokens.bin", "supervised.bin", "offsets.npy", "meta.json"])
def test_an_incomplete_cache_entry_is_created_again(damage: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    made = prepare([tmp_path / "chat.jsonl"], tmp_path / "cache", processes=1)
    [entry] = (tmp_path / "cache").glob("tokens-*/")
    with (entry / damage).open("r+b") as file:
        file.truncate((entry / damage).stat().st_size // 2)
    (tmp_path / "cache" / f"{entry.name}.part").mkdir()
    again = prepare([tmp_path / "chat.jsonl"], tmp_path / "cache", processes=1)
    assert np.array_equal(made.ids[:0], again.ids[:0])
    assert (again.num_documents, again.fingerprint) == (1, made.fingerprint)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [entry.name]


def test_two_concurrent_runs_tokenize_only_once(several_sources: list[Path], tmp_path: Path) -> None:
    reports = [RecordedLines(), RecordedLines()]

    def make(recorded: RecordedLines) -> TokenFile:
        tokenizer = byte_tokenizer(chat_templates.CHATML)
        return prepare_tokens(sources_of(several_sources[0]), tokenizer, tmp_path, Reporter(recorded))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(make, reports)
    assert np.array_equal(first.ids, second.ids)
    messages = [line.message for recorded in reports for line in recorded.all if isinstance(line, LogLine)]
    assert sum(text.startswith("Tokenized") for text in messages) == 1
    assert "Another process is tokenizing the same data; waiting for it." in messages


def test_naming_a_default_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    """Otherwise the data would be tokenized again, and a run whose spec names the default could not be resumed."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey!"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "notes.txt").write_text("Some words.\n")
    chat, lines, notes = ({"path": str(tmp_path / name)} for name in ("chat.jsonl", "lines.jsonl", "notes.txt"))

    def fingerprint(dataset: Any, train_on: Any = None) -> str:
        options = parse(TrainerOptions, {"dataset": dataset, "train_on": train_on})
        found = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
        tokenizer = byte_tokenizer(chat_templates.CHATML)
        return prepare_tokens(found, tokenizer, tmp_path / "cache", Reporter(), train_on=options.train_on).fingerprint

    own_names = {"format": "text", "columns": {"text": "text"}}
    assert {fingerprint(lines), fingerprint({**lines, **own_names}, "all"), fingerprint([lines], "all")} == {
        fingerprint([{**lines, "weight": 2}])
    }
    assert fingerprint(notes) == fingerprint({**notes, "format": "text"}, "all")
    assert fingerprint(chat) == fingerprint({**chat, "format": "messages"}, "assistant")
    assert len({fingerprint(chat), fingerprint(chat, "all"), fingerprint(chat, "completion")}) == 3
    assert len({fingerprint([chat, lines]), fingerprint([chat, lines], "all")}) == 2


def test_duplicates_and_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b", "", "a", "a")))
    tokens = prepare([tmp_path / "a.jsonl"], tmp_path, processes=1, tokenizer=ByT5Tokenizer())
    assert (tokens.num_documents, tokens.num_duplicates, tokens.num_empty) == (4, 2, 1)


def test_rows_are_parsed_only_on_request(several_sources: list[Path]) -> None:
    [source] = sources_of(several_sources[0])
    units = list(source.units())
    assert len(units) > 2
    assert units[-1].position == source.size
    last: list[Row] = list(units[-1].rows())
    assert last[-1].number == NUM_ROWS


@pytest.mark.parametrize("text", ["語😀é" * 200, "語😀é a " * 90 + "\n" + "ab " * 90], ids=["one word", "words"])
def test_a_text_of_one_long_line_is_read_in_pieces(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "UNIT_BYTES", 64)
    monkeypatch.setattr(text_files, "LONGEST_LINE", 100)
    (tmp_path / "long.txt").write_text(text)
    (source,) = sources_of(tmp_path / "long.txt")
    rows = [row for unit in source.units() for row in unit.rows()]
    assert "".join(str(row.fields["text"]) for row in rows) == text
    assert max(len(str(row.fields["text"]).encode()) for row in rows) <= 64 + 100
    assert [row.begins_document for row in rows] == [True, *[False] * (len(rows) - 1)]
    assert [row.ends_document for row in rows] == [*[False] * (len(rows) - 1), True]
