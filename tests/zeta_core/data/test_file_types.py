"""Files of every accepted type are read as the same rows, and content that does not fit its name is rejected."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import ByT5Tokenizer

from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import PathSource
from zeta_core.contract.spec.validation import parse
from zeta_core.data.rows.text_files import UNIT_BYTES
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter

TEXTS = ['Tides follow the moon, "mostly".\nTwice a day.', "Der Mond ist zunehmend.", "1,5\t2"]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]


def tokens_of(path: Path) -> TokenFile:
    options = parse(TrainerOptions, {"dataset": {"path": str(path)}})
    assert isinstance(options.dataset, PathSource)
    sources = open_sources([options.dataset], SourceLocations(any_path=True), pretokenized=False)
    return prepare_tokens(sources, ByT5Tokenizer(), path.parent / "cache", Reporter())


def texts_of(path: Path) -> list[str]:
    tokens = tokens_of(path)
    parts = [tokens.ids[a:b] for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    return [bytes(int(i) - 3 for i in part[:-1]).decode() for part in parts]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def delimited(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the time would make the ids of tests differ between processes


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)  # pyright: ignore[reportUnknownVariableType]


CONTENTS = {
    "rows.jsonl": json_lines(ROWS),
    "rows.ndjson": json_lines(ROWS),
    "rows.NDJSON": b"\xef\xbb\xbf" + json_lines(ROWS),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "minified.json": json.dumps(ROWS, separators=(",", ":"), ensure_ascii=False).encode(),
    "container.json": json.dumps({"version": "1.0", "licences": ["MIT"], "data": ROWS}).encode(),
    "lines.json": json_lines(ROWS),
    "rows.csv": delimited(ROWS, ","),
    "excel.CSV": b"\xef\xbb\xbf" + delimited(ROWS, ",").replace(b"\r\n", b"\n\n", 1),
    "rows.tsv": delimited(ROWS, "\t"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_file_of_rows_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gz), (".ZST", zstd)])
def test_compressed_files_give_the_same_documents(
    name: str, suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    half = len(CONTENTS[name]) // 2
    parts = compress(CONTENTS[name][:half]) + compress(CONTENTS[name][half:])  # like the output of `cat a.gz b.gz`
    (tmp_path / (name + suffix)).write_bytes(parts)
    assert texts_of(tmp_path / (name + suffix)) == TEXTS


@pytest.mark.parametrize("compress", [gz, zstd])
def test_a_compressed_text_file_is_one_document(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    text = "".join(f"Line {number} of a long text.\n" for number in range(30_000))
    assert len(text) > 2 * UNIT_BYTES
    path = tmp_path / ("book.txt.gz" if compress is gz else "book.md.zst")
    path.write_bytes(compress(text.encode()))
    assert texts_of(path) == [text]


@pytest.mark.parametrize("form", ["array.json", "lines.json", "container.json", "rows.csv", "rows.csv.gz"])
def test_files_of_many_units_keep_their_order_and_row_numbers(form: str, tmp_path: Path) -> None:
    rows = [{"text": f"{number} " + "x" * (number % 700)} for number in range(4000)]
    contents = {
        "array.json": json.dumps(rows).encode(),
        "lines.json": json_lines(rows),
        "container.json": json.dumps({"rows": rows}).encode(),
        "rows.csv": delimited(rows, ","),
        "rows.csv.gz": gz(delimited(rows, ",")),
    }
    (tmp_path / form).write_bytes(contents[form])
    assert len(contents[form.removesuffix(".gz")]) > 4 * UNIT_BYTES
    tokens = tokens_of(tmp_path / form)
    assert texts_of(tmp_path / form) == [row["text"] for row in rows]
    assert tokens.rows is not None
    assert list(tokens.rows) == list(range(1, 4001))


def test_one_json_object_with_known_columns_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"id": 1, "text": "Only one."}, indent=1))
    assert texts_of(tmp_path / "one.json") == ["Only one."]


SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
OPENAI = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
RENDERED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"  # a line break follows


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"id": "a", "conversations": SHAREGPT}, [RENDERED]),
        ({"conversations": OPENAI, "id": "a"}, [RENDERED]),
        ({"messages": OPENAI}, [RENDERED]),
        ({"messages": SHAREGPT}, [RENDERED]),
        ({"conversations": [{"id": "a", "conversations": SHAREGPT}] * 2}, [RENDERED] * 2),
        ({"messages": [{"messages": OPENAI}] * 3}, [RENDERED] * 3),
        ({"conversations": [{"text": "One."}, {"text": "Two."}]}, ["One.", "Two."]),
        ({"data": [{"from": "x", "value": "y", "text": "One."}]}, ["One."]),
    ],
    ids=["row", "roles", "messages", "mixed", "rows", "rows-of-messages", "texts", "other-fields"],
)
def test_the_content_of_a_list_decides_if_it_is_a_row_or_rows(
    document: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    for indent in (None, 1):
        (tmp_path / "one.json").write_text(json.dumps(document, indent=indent))
        assert texts_of(tmp_path / "one.json") == expected


def test_the_turns_of_a_single_row_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"id": 1, "dialog": OPENAI}, indent=1))
    with pytest.raises(InvalidData, match=r"no usable columns \(found: dialog, id\)"):
        texts_of(tmp_path / "one.json")


def test_numbers_in_csv_stay_the_text_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "numbers.csv").write_text("text,price\n007,1e5\n1.50,nan\nTrue,\nNULL,x\n")
    assert texts_of(tmp_path / "numbers.csv") == ["007", "1.50", "True", "NULL"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"
CSV_OF_2 = b"text,id\nhello,1\n"
WRONG: list[tuple[str, bytes, str]] = [
    ("a.jsonl", gz(b'{"text": "a"}'), r"a\.jsonl is gzip-compressed; rename it to a\.jsonl\.gz"),
    ("a.txt", zstd(b"some text"), r"a\.txt is zstd-compressed; rename it to a\.txt\.zst"),
    ("a.txt.gz", b"some text", r"is not gzip-compressed"),
    ("a.csv", b"PK\x03\x04rest", r"a\.csv is a ZIP archive; extract or export"),
    ("a.json", b"PAR1....PAR1", r"a\.json is a Parquet file; rename it to end in \.parquet"),
    *[(f"p{suffix}", LFS, "is a Git LFS pointer.*git lfs pull") for suffix in (".txt", ".jsonl", ".parquet", ".csv")],
    ("a.txt", "Ohne Marke gespeichert.".encode("utf-16-le"), "is UTF-16 text; save it as UTF-8"),
    ("a.csv", "text,id\nbig-endian,1\n".encode("utf-16-be"), "is UTF-16 text; save it as UTF-8"),
    ("a.jsonl", '{"text": "with a mark"}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ("a.txt", b"text\n" * 2000 + b"a\0b\n", "line 2001 contains a NUL byte"),
    ("a.jsonl", json.dumps(ROWS).encode(), r"is a JSON array and not JSON Lines.*rename it to a\.json\."),
    ("a.ndjson.gz", gz(json.dumps(ROWS, indent=1).encode()), r"rename it to a\.json\.gz\."),
    ("a.jsonl", json.dumps(ROWS[0], indent=1).encode(), r"line 1 is not valid JSON.*must be named \.json"),
    ("a.json", b'[{"text": "a"}, {"text": }]', r"line 1 is not valid JSON \(Expecting value"),
    ("a.json", b'[{"text": "a"},\n {"text": "b"}\n', r"line 3 is not valid JSON \(the file ends too early"),
    ("a.json", b'[{"text": "a"}] trailing', r"the document ended before this text"),
    ("a.json", b'{"a": [{"text": "a"}], "b": [{"text": "b"}]}', r"several arrays of rows \('a' and 'b'\)"),
    ("a.json", b'{"prompt": "Be brief.", "data": [{"text": "a"}]}', r"'prompt' beside the array 'data'"),
    (
        "a.json",
        b'{"messages": [{"role": "robot", "content": "a"}]}',
        "row 1: 'messages': message 1 has the role 'robot'",
    ),
    ("a.json", b'{"messages": [{"speaker": "x", "text": "a"}]}', "row 1: 'messages': message 1 has no 'role'"),
    ("a.json", b'{"name": "x", "words": ["a"]}', r"contains no array of rows \(its fields: name, words\)"),
    ("a.json", b'"text"', "neither a JSON array nor a JSON object"),
    ("a.json", b'[{"text": "\\ud800"}]', r"row 1 contains \\ud800, an unpaired surrogate"),
    ("a.json", b'[{"text": "\xe4"}]', r"is not UTF-8 text \(byte 0xe4\)"),
    ("a.csv", CSV_OF_2 + b"a,2,3\n", r"row 2 \(it ends in line 3\) has 3 fields, but the header has 2"),
    ("a.csv", CSV_OF_2 + b"\n\nshort\n", r"row 2 \(it ends in line 5\) has 1 fields, but the header has 2"),
    ("a.csv", b'text\n"a" b\n', r"line 2 is not valid CSV"),
    ("a.csv", b'text\n"never closed\n', r"is not valid CSV"),
    ("a.csv", b"text;id\nhello;1\n", "separated by semicolons; a .csv file is separated by commas"),
    ("a.csv", b"text,text\na,b\n", "several columns named 'text'"),
    ("a.csv", b"text\n", "has a header but no rows"),
    ("a.csv", b"text\n\xff\xe4\n", r"line 2 is not UTF-8 text \(byte 0xff\)"),
    ("a.jsonl.gz", gz(json_lines(ROWS))[:-6], r"is not readable as gzip.*truncated or damaged"),
    ("a.csv.zst", zstd(delimited(ROWS, ","))[:-3], r"is not readable as zstd.*truncated or damaged"),
    ("a.parquet.gz", gz(b"PAR1"), r"not a supported file type.*also compressed as \.gz or \.zst"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_content_that_does_not_fit_its_name_is_rejected(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=message) as caught:
        tokens_of(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name", ["zeros.txt.gz", "spaces.jsonl.gz", "rows.json.zst", pytest.param("lines.csv.gz", marks=pytest.mark.slow)]
)
def test_a_decompression_bomb_is_named(name: str, tmp_path: Path) -> None:
    starts = {".json": b"[", ".csv": b"text\n"}
    content = starts.get(Path(Path(name).stem).suffix, b"") + (b"\n" if "lines" in name else b" ") * (80 << 20)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else zstd(content))
    with pytest.raises(InvalidData, match=rf"{name} decompresses to more than \d+ MiB.*decompression bomb"):
        tokens_of(tmp_path / name)


def test_many_copies_of_a_row_are_not_a_bomb(tmp_path: Path) -> None:
    (tmp_path / "copies.jsonl.zst").write_bytes(zstd(json_lines([{"text": "The same words."}] * 50_000)))
    assert tokens_of(tmp_path / "copies.jsonl.zst").num_documents == 50_000
