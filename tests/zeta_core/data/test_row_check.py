"""Checking the rows of a dataset before a run: `zeta_core check` reads all of them, and tokenizes a sample."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import ByT5Tokenizer

from tests.zeta_core.models import LLAMA_CONFIG
from tests.zeta_core.run_directories import SPEC
from zeta_core.contract.job.check import CheckAnswer, CheckedData
from zeta_core.contract.spec.sources import PathSource
from zeta_core.contract.wire.run_directory import file_key
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import prepare_tokens
from zeta_core.dry_run.check import check
from zeta_core.report.reporter import Reporter

# A template that renders roles and contents, and nothing else.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def chat(number: int, answer: str = "The answer") -> dict[str, Any]:
    question = {"role": "user", "content": f"Question {number}"}
    return {"messages": [question, {"role": "assistant", "content": f"{answer} {number}" if answer else ""}]}


def answer_to(
    root: Path,
    content: bytes | list[dict[str, Any]],
    name: str = "data.jsonl",
    *,
    rows_seconds: float = 60.0,
    **spec: Any,
) -> CheckAnswer:
    """The answer of a check for an uploaded file."""
    file = root / "artifacts" / file_key("file_1")
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    file.write_bytes(content)
    request: dict[str, Any] = {
        "spec": {**SPEC, "dataset": {"file": "file_1"}, "chat_template": TEMPLATE, **spec},
        "resolved_spec": {"files": {"file_1": {"filename": name}}},
        "artifacts_root": str(root / "artifacts"),
        "output_dir": str(root / "output"),
        "cache_dir": str(root / "cache"),
        "rows_seconds": rows_seconds,
    }
    return check(json.dumps(request))


def faults_of(answer: CheckAnswer) -> list[str]:
    assert not answer.ok
    assert {detail.param for detail in answer.details} == {"dataset"}
    return [detail.message for detail in answer.details]


def fault_of(answer: CheckAnswer) -> str:
    (fault,) = faults_of(answer)
    return fault


def data_of(answer: CheckAnswer) -> CheckedData:
    assert answer.ok, answer.details
    assert answer.data is not None, answer.pending
    return answer.data


LATE = 1500  # rows before the faulty one, which is therefore not in the sample


def _late(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [*(chat(number) for number in range(LATE)), *rows, *(chat(number) for number in range(LATE))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}, "the role 'usr'"),
        (chat(1, answer=""), "empty assistant turn"),
        ({"conversation": []}, "has no 'messages'"),
        ({"messages": []}, "is empty"),
        ({"messages": [{"role": "user", "content": "Only a question"}]}, "no assistant turn to train on"),
        ({"messages": chat(1)["messages"], "system": 3}, "'system' is a number"),
        ({"messages": [*chat(1)["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}]}, "'weather'"),
        ({"messages": [{**turn, "reasoning": "Because"} for turn in chat(1)["messages"]]}, "has 'reasoning'"),
    ],
    ids=["role", "empty-answer", "no-column", "no-turns", "no-answer", "system", "tool-call", "field"],
)
def test_one_faulty_row_among_thousands_is_found(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    fault = fault_of(answer_to(tmp_path, _late(row)))
    assert fault.startswith((f"data.jsonl, line {LATE + 1}: ", f"data.jsonl, line {LATE + 1} ")), fault
    assert message in fault


def lines_of(faults: Sequence[str]) -> list[int]:
    """The numbers of the lines that the messages name."""
    return [int(re.match(r"data\.jsonl, line (\d+)\b", fault).group(1)) for fault in faults]  # pyright: ignore[reportOptionalMemberAccess]


def test_every_faulty_row_is_reported(tmp_path: Path) -> None:
    unknown = {"messages": [{"role": "usr", "content": "a"}]}
    rows = [chat(number) for number in range(100)]
    rows[56], rows[80] = unknown, chat(1, answer="")
    faults = faults_of(answer_to(tmp_path, rows))
    assert lines_of(faults) == [57, 81]
    assert "the role 'usr'" in faults[0]
    assert "empty assistant turn" in faults[1]
    rows[20] = chat(1, answer="")
    assert lines_of(faults_of(answer_to(tmp_path, rows))) == [21, 57, 81]
    assert lines_of(faults_of(answer_to(tmp_path, rows))) == [21, 57, 81], "from the cache"


def test_every_line_that_is_not_json_is_reported(tmp_path: Path) -> None:
    good = json.dumps(chat(1)).encode()
    content = b"\n".join([good, b"{oops", good, b"null", b"", b'{"messages": [', b"\xff", good])
    faults = faults_of(answer_to(tmp_path, content))
    assert lines_of(faults) == [2, 4, 6, 7]
    assert "is not valid JSON" in faults[0]
    assert "is not an object" in faults[1]
    assert "is not UTF-8" in faults[3]


def test_at_most_fifty_faulty_rows_are_reported(tmp_path: Path) -> None:
    rows = [chat(0), *(chat(number, answer="") for number in range(80))]
    assert lines_of(faults_of(answer_to(tmp_path, rows))) == list(range(2, 52))


@pytest.mark.extended
def test_the_first_faults_are_reported_if_several_processes_read_the_data(tmp_path: Path) -> None:
    filler, rows = "word " * 400, 6000  # 12 MB: enough for three processes
    many = [chat(number, answer=filler) for number in range(rows)]
    assert data_of(answer_to(tmp_path, many)).rows == rows
    for late, early in ((5900, 4100), (4100, 1700), (1700, 150)):
        many[late] = chat(late, answer="")
        many[early] = {"messages": [{"role": "usr", "content": "a"}]}
        assert lines_of(faults_of(answer_to(tmp_path, many)))[:2] == [early + 1, late + 1]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (gzip.compress(b'{"text": "a"}\n'), "data.jsonl", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "data.jsonl", "Git LFS"),
        (b'{"text": "a"}\n' * 9000 + b'{"text": "a"', "data.jsonl", "line 9001 is not valid JSON"),
        (b"A line\n" * 90000 + b"\xff\n", "data.txt", "line 90001 is not UTF-8"),
        (b"text\n" + b"a\n" * 9000 + b"a,b\n", "data.csv", "9002"),
    ],
    ids=["gzip", "lfs-pointer", "last-line", "utf-8", "csv"],
)
def test_a_damaged_file_is_found(tmp_path: Path, content: bytes, name: str, message: str) -> None:
    assert message in fault_of(answer_to(tmp_path, content, name, chat_template=None))


def test_rows_of_ids_are_all_checked(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"use_pretokenized": True, "chat_template": None}
    rows: list[dict[str, Any]] = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]} for _ in range(LATE)]
    data = data_of(answer_to(tmp_path, rows, **spec))
    assert (data.rows, data.tokens, data.trained_share, data.formats) == (LATE, 3 * LATE, round(2 / 3, 4), ["tokens"])
    assert f"line {LATE + 1}: 'labels'" in fault_of(
        answer_to(tmp_path, [*rows, {"input_ids": [5, 6], "labels": [5, 9]}], **spec)
    )
    assert "has no 'labels', which other rows have" in fault_of(
        answer_to(tmp_path, [*rows, {"input_ids": [5, 6]}], **spec)
    )
    too_large = answer_to(tmp_path, [*rows, {"input_ids": [5, 4000], "labels": [5, 4000]}], **spec)
    assert "token id 4000" in too_large.details[0].message


def test_the_answer_describes_the_rows(tmp_path: Path) -> None:
    rows = [{"question": "How many?" * 3, "answer": "Four", "id": number, "source": "x"} for number in range(400)]
    data = data_of(answer_to(tmp_path, rows))
    assert (data.rows, data.complete, data.note) == (400, True, None)
    assert (data.formats, data.shapes) == (["messages"], ["question and answer"])
    assert data.unused_columns == ["id", "source"]
    length = len("<user>" + "How many?" * 3 + "</user><assistant>Four</assistant>")
    assert (data.tokens, data.longest_tokens) == (400 * length, length)
    assert data.trained_share == round(len("Four</assistant>") / length, 4)
    assert data.too_long_share == 1.0, "seq_len is 32"
    assert 100 <= data.sampled_rows <= 200


def test_the_check_reads_a_text_file_as_one_document(tmp_path: Path) -> None:
    text = "One line of the text.\n" * 40_000  # several units
    data = data_of(answer_to(tmp_path, text.encode(), "book.txt"))
    assert (data.rows, data.tokens) == (1, data.longest_tokens)
    assert data.tokens == pytest.approx(len(text) + 1, abs=1), "only a part of the pieces is tokenized"
    (tmp_path / "book.txt").write_text(text)
    sources = open_sources(
        [PathSource(path=str(tmp_path / "book.txt"))], SourceLocations(any_path=True), pretokenized=False
    )
    tokens = prepare_tokens(sources, ByT5Tokenizer(), tmp_path / "tokens", Reporter())
    assert tokens.offsets.tolist() == [0, len(text) + 1]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"  \n \n" * 100_000, "book.txt", "contains no text to train on"),
        (b'{"text": " "}\n{"text": ""}\n' * 1000, "data.jsonl", "contains no text to train on"),
        (
            b'{"input_ids": [5, 6], "labels": [5, -100]}\n' * 3,
            "data.jsonl",
            "no token is trained on in any of the 3 row",
        ),
    ],
    ids=["file", "rows", "masks"],
)
def test_data_without_anything_to_train_on_is_found(tmp_path: Path, content: bytes, name: str, message: str) -> None:
    spec = {"use_pretokenized": True} if b"labels" in content else {}
    assert message in fault_of(answer_to(tmp_path, content, name, chat_template=None, **spec))


def test_many_blank_rows_before_the_text_are_not_mistaken_for_missing_text(tmp_path: Path) -> None:
    rows = [""] * 150 + [f"hello world {number}" for number in range(200)]
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows)
    answer = answer_to(tmp_path, content, "a.jsonl", chat_template=None)
    assert answer.ok, answer.details
    assert answer.data is not None
    assert answer.data.rows == 350


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD_IDS = np.arange(5, 200)  # of the 259 ids of the model


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (GOOD_IDS.astype("<u2").tobytes(), "ids.bin"),
        (GOOD_IDS.astype("<u4").tobytes(), "ids.bin"),
        (npy(GOOD_IDS), "ids.npy"),
    ],
    ids=["16-bit", "32-bit", "npy"],
)
def test_flat_files_of_ids_are_described(content: bytes, name: str, tmp_path: Path) -> None:
    data = data_of(answer_to(tmp_path, content, name, use_pretokenized=True, chat_template=None))
    assert (data.rows, data.complete, data.formats) == (1, True, ["tokens"])
    assert (data.tokens, data.longest_tokens) == (len(GOOD_IDS), len(GOOD_IDS))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (np.arange(5, 4000).astype("<u2").tobytes(), "ids.bin", "token id 3999"),
        (npy(np.arange(5, 4000)), "ids.npy", "token id 3999"),
        (npy(np.array([5, -100, 6])), "ids.npy", "token ids must not be negative"),
        (npy(np.array([0.5, 1.5])), "ids.npy", "type float64; provide a vector"),
        (npy(GOOD_IDS)[:-9], "ids.npy", "is not readable as a flat file of ids"),
        (GOOD_IDS.astype("<u2").tobytes() + b"x", "ids.bin", "odd number of bytes"),
        (struct.pack("<3i", 20240520, 1, 900).ljust(1024, b"\0") + b"\5\0" * 90, "ids.bin", "the file is incomplete"),
    ],
    ids=["vocabulary", "vocabulary-npy", "negative", "floats", "truncated", "odd", "header"],
)
def test_faults_in_flat_files_of_ids_are_found(content: bytes, name: str, message: str, tmp_path: Path) -> None:
    answer = answer_to(tmp_path, content, name, use_pretokenized=True, chat_template=None)
    assert not answer.ok
    assert message in answer.details[0].message


def test_16_bit_ids_are_rejected_for_a_larger_vocabulary(tmp_path: Path) -> None:
    model = {"config": {**LLAMA_CONFIG, "vocab_size": 70_000}}
    content = GOOD_IDS.astype("<u2").tobytes()
    spec: dict[str, Any] = {"use_pretokenized": True, "chat_template": None, "model": model}
    fault = fault_of(answer_to(tmp_path, content, "ids.bin", **spec))
    assert "cannot represent the 70,000 ids" in fault


def test_options_that_flat_files_do_not_support_are_rejected(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"use_pretokenized": True, "chat_template": None, "train_on": "assistant"}
    assert "do not mark what is trained on" in fault_of(answer_to(tmp_path, npy(GOOD_IDS), "ids.npy", **spec))


def test_a_flat_file_of_100_mb_is_read_within_the_time_or_reported(tmp_path: Path) -> None:
    content = np.tile(GOOD_IDS.astype("<u2"), 50_000_000 // len(GOOD_IDS)).tobytes()
    spec: dict[str, Any] = {"use_pretokenized": True, "chat_template": None}
    assert data_of(answer_to(tmp_path, content, "ids.bin", **spec)).tokens == len(content) // 2
    late = answer_to(tmp_path, content, "ids.bin", rows_seconds=0.0, **spec)
    assert late.data is None
    assert "could not be read within the time limit" in late.pending["data"]


def test_results_are_cached_by_the_content_of_the_data(tmp_path: Path) -> None:
    good, bad = [chat(number) for number in range(300)], [chat(1), chat(2, answer="")]
    first = data_of(answer_to(tmp_path, good))
    (kept,) = (tmp_path / "cache").glob("rows-*.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "rows": 7}))
    assert data_of(answer_to(tmp_path, good, seq_len=64)).rows == 7 != first.rows, "another seq_len uses the result"
    assert "line 2" in fault_of(answer_to(tmp_path, bad)), "other content does not"
    assert data_of(answer_to(tmp_path, good, train_on="all")).rows == 300, "nor do other options"


def test_only_the_rows_within_the_time_are_checked(tmp_path: Path) -> None:
    data_of(answer_to(tmp_path, [chat(1)]))  # fills the cache
    (kept,) = (tmp_path / "cache").glob("rows-*.json")
    kept.unlink()
    file = tmp_path / "artifacts" / file_key("file_1")
    request: dict[str, Any] = {
        "spec": {**SPEC, "dataset": {"file": "file_1"}},
        "resolved_spec": {"files": {"file_1": {"filename": file.with_suffix(".jsonl").name}}},
        "artifacts_root": str(tmp_path / "artifacts"),
        "output_dir": str(tmp_path / "output"),
        "cache_dir": str(tmp_path / "cache"),
        "rows_seconds": 0.0,
    }
    data = data_of(check(json.dumps(request)))
    assert (data.complete, data.rows) == (False, 0)
    assert "Only the first 0 rows were checked" in (data.note or "")
    assert not list((tmp_path / "cache").glob("rows-*.json"))


def test_a_row_without_its_group_is_found(tmp_path: Path) -> None:
    rows = [{**chat(number), "topic": number} for number in range(LATE)]
    options: dict[str, Any] = {"group_by": "topic", "eval_split": 0.1}
    assert data_of(answer_to(tmp_path, rows, **options)).unused_columns == []
    fault = fault_of(answer_to(tmp_path, [*rows, chat(1)], **options))
    assert fault.startswith(f"data.jsonl, line {LATE + 1} has no text or number in 'topic'")


def test_a_fault_in_the_held_out_data_names_its_field(tmp_path: Path) -> None:
    held_out = tmp_path / "artifacts" / file_key("file_2")
    held_out.parent.mkdir(parents=True)
    held_out.write_text(json.dumps(chat(1)) + "\n" + json.dumps({"messages": 1}) + "\n")
    spec: dict[str, Any] = {**SPEC, "dataset": {"file": "file_1"}, "eval_dataset": {"file": "file_2"}}
    (tmp_path / "artifacts" / file_key("file_1")).write_text(json.dumps(chat(1)) + "\n")
    names = {"file_1": {"filename": "a.jsonl"}, "file_2": {"filename": "b.jsonl"}}
    request = {"spec": spec, "resolved_spec": {"files": names}, "artifacts_root": str(tmp_path / "artifacts")}
    answer = check(json.dumps({**request, "output_dir": str(tmp_path / "output")}))
    assert [(detail.param, detail.message.partition(":")[0]) for detail in answer.details] == [
        ("eval_dataset", "b.jsonl, line 2")
    ]


def test_fields_that_the_source_drops_are_not_checked(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi", "audio": {"id": 1}}, *chat(1)["messages"][1:]]}]
    assert not answer_to(tmp_path, rows).ok
    dataset = {"file": "file_1", "drop_fields": ["audio"]}
    assert data_of(answer_to(tmp_path, rows, dataset=dataset)).rows == 1


def test_a_role_that_is_not_text_is_a_fault(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": ["user"], "content": "Hi"}, *chat(1)["messages"]]}]
    assert "message 1 has the role" in fault_of(answer_to(tmp_path, rows))


@pytest.mark.parametrize("option", [{"columns": {"system": "sytem"}}, {"drop_columns": ["sytem"]}])
def test_columns_without_effect_are_a_fault(tmp_path: Path, option: dict[str, Any]) -> None:
    dataset = {"file": "file_1", **option}
    assert "'sytem'" in fault_of(answer_to(tmp_path, [chat(1), chat(2)], dataset=dataset))


def test_the_first_row_without_a_mask_is_named_with_any_number_of_processes(tmp_path: Path) -> None:
    with_labels: dict[str, Any] = {"input_ids": [5, 6] * 2000, "labels": [-100, 6] * 2000}
    rows = [with_labels] * 10 + [{"input_ids": with_labels["input_ids"]}] * 1500
    answer = answer_to(tmp_path, rows, use_pretokenized=True, chat_template=None)
    assert "line 11 has no 'labels'" in fault_of(answer)


@pytest.mark.slow  # waits for a limit of 30 s
def test_an_exceeded_limit_is_not_cached(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi " * 1000}, *chat(1)["messages"]]}] * 5
    endless = "{% for a in range(10000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}" + TEMPLATE
    assert not answer_to(tmp_path, rows, chat_template=endless).ok
    assert not list((tmp_path / "cache").glob("rows-*.json"))
