"""Every format is read and tokenized once, and every error names the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import ByT5Tokenizer

from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.resolved_spec import UploadedFile
from zeta_core.contract.spec.sources import PathSource, dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter
from zeta_core.system.data_folder import Split

TEXTS = ["The first document.\n", "Der zweite, mit Ümläuten.\n"]


def tokens_of(
    source: dict[str, Any], tmp_path: Path, *, locations: SourceLocations | None = None, pretokenized: bool = False
) -> TokenFile:
    options = parse(TrainerOptions, {"dataset": source})
    locations = locations or SourceLocations(any_path=True)
    sources = open_sources(dataset_sources(options.dataset), locations, pretokenized=pretokenized)
    return prepare_tokens(sources, ByT5Tokenizer(), tmp_path / "cache", Reporter())


def text_of(tokens: TokenFile) -> list[str]:
    parts = [tokens.ids[a:b] for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    assert all(part[-1] == 1 for part in parts), "each document ends with the end token"
    return [bytes(int(i) - 3 for i in part[:-1]).decode() for part in parts]


def _write(path: Path) -> None:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
        case ".parquet":
            parquet.write_table(pa.table({"text": TEXTS}), path)
        case _:
            table = pa.table({"text": TEXTS})
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_each_row_is_a_document(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    _write(path)
    assert text_of(tokens_of({"path": str(path)}, tmp_path)) == TEXTS


def test_a_text_file_is_one_document_and_a_folder_means_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    assert text_of(tokens_of({"path": str(folder)}, tmp_path)) == TEXTS
    assert text_of(tokens_of({"path": str(folder / "*.txt")}, tmp_path)) == TEXTS
    (folder / "part [1].txt").write_text("a name like a pattern")
    assert text_of(tokens_of({"path": str(folder / "part [1].txt")}, tmp_path)) == ["a name like a pattern"]


def test_a_folder_on_a_worker_is_read_as_a_client_uploads_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("train.txt", "test.txt", "README.md", ".ipynb_checkpoints/train.txt", "sub/B.TXT"):
        (root / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "corpus" / name).write_text(name)
    locations = SourceLocations(data_root=root)

    def texts(path: str, split: Split = "train") -> tuple[list[str], list[str]]:
        messages: list[str] = []
        source = PathSource(path=path)
        found = open_sources([source], locations, pretokenized=False, split=split, on_folder=messages.append)
        return [source.name for source in found], messages

    assert texts("corpus")[0] == ["B.TXT", "train.txt"]
    assert texts("corpus", "held_out")[0] == ["B.TXT", "test.txt"]
    names, messages = texts("corpus/**/*.txt")
    assert names == ["train.txt"]
    assert messages[0].startswith("Using 1 data file of corpus/**/*.txt: train.txt. Skipped")
    assert str(root) not in messages[0]
    assert texts("corpus/test.txt")[0] == ["test.txt"]
    (root / "corpus" / "train.txt").unlink()
    (root / "corpus" / "sub" / "B.TXT").unlink()
    with pytest.raises(InvalidData, match=r"no data file.*README\.md \(documentation\).*test\.txt \(held-out split"):
        texts("corpus")
    (root / "corpus" / "out").symlink_to(tmp_path)
    with pytest.raises(InvalidData, match="is outside the data root"):
        texts("corpus")


def test_another_column_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "words"}\n')
    assert text_of(tokens_of({"path": str(path), "columns": {"text": "body"}}, tmp_path)) == ["words"]


def test_python_docs_are_on_every_machine(tmp_path: Path) -> None:
    tokens = tokens_of({"builtin": "python-docs"}, tmp_path)
    assert tokens.num_documents > 50
    assert tokens.num_tokens > 300_000


def _table(columns: list[str], value: bytes) -> bytes:
    """A Parquet file of one row, whose columns all contain these bytes as text."""
    text = pa.array([value]).view(pa.string())
    file = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_arrays([text] * len(columns), names=columns), file)
    return file.getvalue().to_pybytes()


def _damaged(table: bytes) -> bytes:
    return table[:30] + bytes(60) + table[90:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl, line 2 is not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "one"}\n\n{"body": "x"}\n',
            r"a\.jsonl, line 3 has no 'text' \(it has: body\); name",
        ),
        (
            "a.jsonl",
            b'{"text": "\\uD83D\\uDE00"}\n{"text": "\\uD83D"}\n',
            r"a\.jsonl, line 2 contains \\ud83d, an unpaired surr",
        ),
        ("a.jsonl", b'{"input_ids": [1]}\n', r"has 'input_ids' instead of 'text'; set use_pretokenized"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: 'text' is a number; it must be text"),
        ("a.jsonl", b'{"text": "one"}\n[1]\n', r"a\.jsonl, line 2 is not an object"),
        ("a.txt", b"fine\n\xff\xfe\n", r"a\.txt, line 2 is not UTF-8 text \(byte 0xff\)"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.jsonl", b'{"text": ""}\n', r"contains no text to train on"),
        ("a.jsonl", b'{"text": " "}\n{"text": "\\n\\t\\n"}\n', r"a\.jsonl contains no text to train on"),
        (
            "a.txt",
            b"\n \t \xc2\xa0\n" * 9,
            r"a\.txt contains no text to train on; provide at least one document with some",
        ),
        ("a.parquet", b"no parquet", r"a\.parquet is not a Parquet file"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet is not readable as parquet"),
        ("a.parquet", _damaged(_table(["text"], b"fine " * 5000)), r"a\.parquet is not readable as parquet: Corrupt"),
        ("a.parquet", _table(["text", "text"], b"fine"), r"a\.parquet has several columns named 'text'"),
        (
            "a.parquet",
            _table(["text"], b"\xff\xfe"),
            r"a\.parquet, rows 1 to 1 contain text that is not UTF-8 \(byte 0xff\)",
        ),
        ("a.pkl", b"a,b", r"a\.pkl is not a supported file type"),
    ],
)
def test_a_fault_names_the_file_and_the_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        tokens_of({"path": str(tmp_path / name)}, tmp_path)


def test_an_uploaded_file_is_found_by_id_and_reported_by_name(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "files").mkdir(parents=True)
    (store / "files" / "file_1").write_bytes(b'{"text": "ok"}\nnot json\n')
    locations = SourceLocations(
        files={"file_1": UploadedFile(filename="mine.jsonl", sha256="0" * 64)}, artifacts_root=store
    )
    with pytest.raises(InvalidData, match=r"mine\.jsonl, line 2 is not valid JSON"):
        tokens_of({"file": "file_1"}, tmp_path, locations=locations)


@pytest.mark.parametrize("pattern", ["../secret.txt", "/etc/passwd", "link.txt"])
def test_a_job_cannot_read_outside_the_data_root(pattern: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InvalidData, match=f"dataset.path is {pattern!r}, which is outside the data root"):
        tokens_of({"path": pattern}, tmp_path, locations=SourceLocations(data_root=root))


def test_rows_of_ids_are_used_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    parquet.write_table(pa.table({"input_ids": [[5, 6, 7], [8, 9]]}), path)
    tokens = tokens_of({"path": str(path)}, tmp_path, pretokenized=True)
    assert (tokens.ids.tolist(), tokens.offsets.tolist()) == ([5, 6, 7, 8, 9], [0, 3, 5])


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_a_flat_file_of_ids_is_used_in_place(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([5, 6, 7, 8, 9], dtype=dtype))
    tokens = tokens_of({"path": str(path)}, tmp_path, pretokenized=True)
    assert (tokens.ids.tolist(), tokens.offsets.tolist(), tokens.largest_id) == ([5, 6, 7, 8, 9], [0, 5], 9)
    np.save(tmp_path / "ids.offsets.npy", np.array([0, 2, 5]))
    assert tokens_of({"path": str(path)}, tmp_path, pretokenized=True).offsets.tolist() == [0, 2, 5]


def test_the_same_content_is_tokenized_once(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("the same words")
    second.write_text("the same words")
    made = tokens_of({"path": str(first)}, tmp_path)
    assert tokens_of({"path": str(second)}, tmp_path).fingerprint == made.fingerprint
    assert len(list((tmp_path / "cache").glob("tokens-*/"))) == 1
    first.write_text("other words")
    assert tokens_of({"path": str(first)}, tmp_path).fingerprint != made.fingerprint
