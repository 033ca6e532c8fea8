"""Data and templates that would exhaust or crash a run are rejected with their location and the limit."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import ByT5Tokenizer

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.rows.row import Unit
from zeta_core.data.sandbox import MEBIBYTE, ProcessLimits
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter

# Child processes inherit memory that this process has freed, which is not counted; the bombs are several times larger.
SMALL = ProcessLimits(memory_bytes=400 * MEBIBYTE, rendering_seconds=1)
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]}


def tokens_of(
    path: Path, tokenizer: Any | None = None, *, limits: ProcessLimits = SMALL, pretokenized: bool = False
) -> TokenFile:
    options = parse(TrainerOptions, {"dataset": {"path": str(path)}})
    assert options.dataset is not None
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=pretokenized)
    return prepare_tokens(sources, tokenizer or ByT5Tokenizer(), path.parent / "cache", Reporter(), limits=limits)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Any:
    """Check that no sandboxed process is left. Services of other tests may continue to run."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


# --- Templates --------------------------------------------------------------------------------------------------------

ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}"
)
DOUBLING = "{% set n = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"


MEMORY = "exceeded 400 MiB of memory when rendering"
TIME = "exceeded 1 s of CPU time when rendering"
EXHAUSTING = [
    ("{{ 'a' * 10**10 }}", MEMORY),
    ("{{ 'a'|center(3000000000) }}", MEMORY),
    ("{{ '{:3000000000d}'.format(1) }}", MEMORY),
    ("{{ ([messages[0]['content']] * 10**8)|join(',') }}", MEMORY),
    (f"{DOUBLING}{{{{ n.s }}}}", MEMORY),
    ("{{ 10**(10**8) }}", TIME),
    ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "rejects the conversation: maximum recursion"),
    ("{% for i in range(10**9) %}a{% endfor %}", "template rejects the conversation: Range too big"),
    ("{{ messages[0]['content'] * 15000000 }}", "produced 30,000,000 characters for this row, more than the 16,"),
]
SIMILAR = [
    ("{{ messages[0]['content'] * 10**9 }}", MEMORY),
    ("{{ '%3000000000d' % 1 }}", MEMORY),
    ("{{ messages[0]['role'].ljust(3000000000) }}", MEMORY),
    ("{{ (messages|length + 8)**1000000000 }}", TIME),
    (ENDLESS, TIME),
]


@pytest.mark.parametrize(
    ("template", "message"), [*EXHAUSTING, *(pytest.param(*case, marks=pytest.mark.extended) for case in SIMILAR)]
)
def test_a_template_that_exhausts_the_machine_is_rejected(template: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(InvalidData, match=message) as rejection:
        tokens_of(tmp_path / "a.jsonl", byte_tokenizer(template))
    assert rejection.value.message.startswith("a.jsonl, line 1: the tokenizer's chat template")


def test_a_row_that_its_template_makes_huge_is_named(tmp_path: Path) -> None:
    template = CHATML + "{% if messages[-1]['content'] == 'now' %}{{ 'a' * 10**10 }}{% endif %}"
    rows = [ROW, {"messages": [*ROW["messages"][:1], {"role": "assistant", "content": "now"}]}, ROW]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidData, match=r"a\.jsonl, line 2: the tokenizer's chat template exceeded"):
        tokens_of(tmp_path / "a.jsonl", byte_tokenizer(template))


# --- Files that are larger than they look -----------------------------------------------------------------------------


def parquet_of(path: Path, table: Any) -> Path:
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 2 * MEBIBYTE, "the file is small, but its rows are large"
    return path


@pytest.mark.extended
def test_a_parquet_file_of_one_huge_string_is_rejected(tmp_path: Path) -> None:
    huge = pa.array(["a" * (8 * MEBIBYTE)] * 100)
    path = parquet_of(tmp_path / "bomb.parquet", pa.table({"text": huge}))
    with pytest.raises(InvalidData, match="more than 400 MiB") as rejection:
        tokens_of(path)
    assert rejection.value.message.startswith(f"bomb.parquet ({path.stat().st_size:,} bytes, 100 rows), from row 1:")


@pytest.mark.extended
def test_a_parquet_row_of_a_billion_values_is_rejected(tmp_path: Path) -> None:
    values = pa.array(np.zeros(200_000_000, dtype=np.int32))
    rows = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    path = parquet_of(tmp_path / "ids.parquet", pa.table({"input_ids": rows}))
    del values, rows
    with pytest.raises(InvalidData, match=r"ids\.parquet \(.* 1 rows?\), from row 1: .* 400 MiB of memory"):
        tokens_of(path, pretokenized=True)


@pytest.mark.extended
def test_rows_that_are_large_but_fit_are_read(tmp_path: Path) -> None:
    """Batches are sized by the size of the rows, so many large rows fit into memory."""
    texts = [f"{number:04d}" * (256 * 1024) for number in range(120)]
    path = parquet_of(tmp_path / "large.parquet", pa.table({"text": texts}))
    tokens = tokens_of(path)
    assert (tokens.num_documents, tokens.num_tokens) == (120, 120 * (MEBIBYTE + 1))


@pytest.mark.extended
@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_compressed_arrow_file_that_expands_is_rejected(write: Callable[..., Any], tmp_path: Path) -> None:
    batch = pa.record_batch({"text": pa.array(["a" * (64 * MEBIBYTE)] * 12)})
    with write(tmp_path / "a.arrow", batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    assert (tmp_path / "a.arrow").stat().st_size < MEBIBYTE
    with pytest.raises(InvalidData, match=r"a\.arrow.*requires more than 400 MiB of memory"):
        tokens_of(tmp_path / "a.arrow")


@pytest.mark.extended
def test_a_json_row_that_takes_many_times_its_size_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "", "more": [' + "[]," * 25_000_000 + "[]]}\n")
    with pytest.raises(
        InvalidData, match=r"a\.jsonl: decoding it requires more than (400 MiB of memory|4 s of CPU time)"
    ):
        tokens_of(tmp_path / "a.jsonl")


def test_a_json_line_without_an_end_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeta_core.data.rows.text_files.LONGEST_ROW", 3 * MEBIBYTE)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "' + "a " * 2 * MEBIBYTE)
    with pytest.raises(InvalidData, match=r"a\.jsonl, line 2 is longer than 3 MiB, the limit for one row"):
        tokens_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("depth", [900, 5_000, 1_000_000])
def test_json_that_is_nested_too_deeply_is_rejected(depth: int, tmp_path: Path) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    turn = '{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey", "tool_calls": '
    call = f'[{{"function": {{"name": "f", "arguments": {nested}}}}}]}}'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": [{turn}{call}]}}\n')
    template = "{% for m in messages %}{{ m.role }}{{ m.tool_calls|tojson if m.tool_calls else m.content }}{% endfor %}"
    with pytest.raises(InvalidData, match=r"a\.jsonl, line 1 is .*(recursion|nested too deeply)"):
        tokens_of(tmp_path / "a.jsonl", byte_tokenizer(template))


def test_token_ids_beyond_every_integer_type_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"input_ids": [1, 2]}}\n{{"input_ids": [{10**300}]}}\n')
    with pytest.raises(InvalidData, match=r"a\.jsonl, line 2 contains token ids of more than 32 bits"):
        tokens_of(tmp_path / "a.jsonl", pretokenized=True)


@pytest.mark.parametrize(
    "shape", ["(10**15,)", "(1000000000000000,)", "(-5,)", "(9223372036854775808,)", "(" * 900 + "5" + ",)" * 900]
)
def test_an_npy_header_with_a_wrong_shape_is_rejected(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    with pytest.raises(InvalidData, match=r"a\.npy is not readable as a flat file of ids"):
        tokens_of(tmp_path / "a.npy", pretokenized=True)


def test_wrong_offsets_beside_a_flat_file_are_rejected(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    for content in (np.arange(3.0), np.zeros((2, 2), np.int64), np.array([0, 50]), np.array([], np.int64)):
        np.save(tmp_path / "a.offsets.npy", content)
        with pytest.raises(InvalidData, match=r"a\.offsets\.npy must "):
            tokens_of(tmp_path / "a.npy", pretokenized=True)
    (tmp_path / "a.offsets.npy").write_bytes((tmp_path / "a.offsets.npy").read_bytes()[:40])
    with pytest.raises(InvalidData, match=r"a\.offsets\.npy"):
        tokens_of(tmp_path / "a.npy", pretokenized=True)


# --- Arrow files with inconsistent buffers ----------------------------------------------------------------------------


TEXTS = pa.array(["one", "two", None, "four"])
OFFSETS = struct.pack("<5i", 0, 3, 6, 6, 10)
INCONSISTENT: dict[str, tuple[Any, bytes, bytes]] = {  # a valid column, bytes of its file, and their replacement
    "offsets far beyond": (TEXTS, OFFSETS, struct.pack("<5i", 0, 3, 6, 6, 2**31 - 1)),
    "offsets a little beyond": (TEXTS, OFFSETS, struct.pack("<5i", 0, 3, 6, 6, 2**12)),
    "offsets in the middle beyond": (TEXTS, OFFSETS, struct.pack("<5i", 0, 2**20, 6, 6, 10)),
    "decreasing offsets": (TEXTS, OFFSETS, struct.pack("<5i", 0, 6, 3, 6, 10)),
    "negative offsets": (TEXTS, OFFSETS, struct.pack("<5i", -(2**20), 3, 6, 6, 10)),
    "large offsets": (
        TEXTS.cast(pa.large_string()), struct.pack("<5q", 0, 3, 6, 6, 10), struct.pack("<5q", 0, 3, 6, 6, 2**40)),
    "fewer offsets than rows": (TEXTS, struct.pack("<q", len(OFFSETS)), struct.pack("<q", 8)),
    "more offsets than the file": (TEXTS, struct.pack("<q", len(OFFSETS)), struct.pack("<q", 2**40)),
    "other nulls than are counted": (TEXTS, bytes([0b1011]) + bytes(7), bytes([0b0001]) + bytes(7)),
    "dictionary indices": (
        TEXTS.dictionary_encode(), struct.pack("<4i", 0, 1, 0, 2), struct.pack("<4i", 0, 1, 0, 10**6)),
    "negative dictionary indices": (
        TEXTS.dictionary_encode(), struct.pack("<4i", 0, 1, 0, 2), struct.pack("<4i", 0, -1, 0, 2)),
    "views": (
        pa.array(["a string that is longer than twelve"], pa.string_view()),
        struct.pack("<i4sii", 35, b"a st", 0, 0), struct.pack("<i4sii", 35, b"a st", 0, 2**30)),
    "views of other buffers": (
        pa.array(["a string that is longer than twelve"], pa.string_view()),
        struct.pack("<i4sii", 35, b"a st", 0, 0), struct.pack("<i4sii", 35, b"a st", 77, 0)),
    "lists": (pa.array([["a", "b"], ["c"]]), struct.pack("<3i", 0, 2, 3), struct.pack("<3i", 0, 2, 10**6)),
}  # fmt: skip


@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("case", INCONSISTENT)
def test_an_arrow_file_with_inconsistent_buffers_is_rejected(
    case: str, write: Callable[..., Any], tmp_path: Path
) -> None:
    column, valid, invalid = INCONSISTENT[case]
    path = tmp_path / "a.arrow"
    with write(path, pa.schema([("text", column.type)])) as writer:
        writer.write_batch(pa.record_batch({"text": column}))
    assert valid in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(valid, invalid))
    with pytest.raises(InvalidData, match=r"^a\.arrow.*(is damaged|not readable as Arrow)") as rejection:
        tokens_of(path)
    assert "crashed" not in rejection.value.message, "the fault is found before a value is read"


@pytest.mark.extended
def test_a_damaged_arrow_file_never_crashes_the_run(tmp_path: Path) -> None:
    """Set each byte of a small file in turn to values that are dangerous in offsets and lengths."""
    batch = pa.record_batch(
        {
            "text": pa.array(["one", None, "three" * 9], pa.string()),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "more": pa.array([[1, 2], [], None]),
        }
    )
    with pa.ipc.new_stream(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    whole = (tmp_path / "a.arrow").read_bytes()
    random = np.random.default_rng(0)
    errors: list[str] = []
    for at in random.choice(len(whole), 60, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= int(random.integers(1, 256))
        (tmp_path / "a.arrow").write_bytes(damaged)
        try:
            tokens_of(tmp_path / "a.arrow")
        except InvalidData as error:
            errors.append(error.message)
    assert len(errors) > 5
    assert all("a.arrow" in message for message in errors), errors


def test_bytes_after_the_end_of_an_arrow_stream_are_rejected(tmp_path: Path) -> None:
    """A damaged length of zero looks like the end of the stream; the rows behind it must not be lost in silence."""
    batch = pa.record_batch({"text": pa.array(["one two three"] * 50)})
    with pa.ipc.new_stream(tmp_path / "a.arrow", batch.schema) as writer:
        for _ in range(3):
            writer.write_batch(batch)
    whole = (tmp_path / "a.arrow").read_bytes()
    begins = [at for at in range(0, len(whole), 8) if whole[at : at + 4] == b"\xff" * 4]
    (tmp_path / "a.arrow").write_bytes(whole[: begins[2]] + b"\xff\xff\xff\xff\0\0\0\0" + whole[begins[2] + 8 :])
    with pytest.raises(
        InvalidData, match=r"a\.arrow is not readable as Arrow: the stream ends at byte .*write it again"
    ):
        tokens_of(tmp_path / "a.arrow")


def test_a_parquet_file_must_contain_the_bytes_that_its_metadata_claims(tmp_path: Path) -> None:
    """Only its data is shortened, so its metadata is intact, and claims more bytes than the file has."""
    texts = pa.array([f"text {number}" * 50 for number in range(100)])
    pq.write_table(  # pyright: ignore[reportUnknownMemberType]
        pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False
    )
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:1000] + whole[-2000:])
    with pytest.raises(InvalidData, match=r"row group 0 claims \d+ bytes from byte 4 on"):
        tokens_of(tmp_path / "a.parquet")


def test_a_parquet_schema_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [["one"]]}), tmp_path / "a.parquet")  # pyright: ignore[reportUnknownMemberType]
    damaged = (tmp_path / "a.parquet").read_bytes().replace(b"element", b"\xfflement")
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(InvalidData, match=r"a\.parquet is not readable as parquet: .*utf-8.*write it again"):
        tokens_of(tmp_path / "a.parquet")


def test_a_process_that_crashes_while_it_reads_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in a library, which validation cannot find: it reads from address 0."""
    import ctypes

    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    options = parse(TrainerOptions, {"dataset": {"path": str(tmp_path / "a.jsonl")}})
    assert options.dataset is not None
    [source] = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)

    def read(_: object) -> Iterator[Unit]:
        ctypes.string_at(0)
        return iter([])

    crashing = replace(source, read=read)
    with pytest.raises(InvalidData, match=r"a\.jsonl: decoding it crashed \(SIGSEGV\)"):
        prepare_tokens([crashing], ByT5Tokenizer(), tmp_path / "cache", Reporter(), limits=SMALL)
