"""Flat files of ids are read with their own type, or rejected."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.zeta_core.models import llama
from tests.zeta_core.runs import RecordedLines, train
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.job.events import LogLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.documents.conversations import TrainOn
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.data.tokens.flat_files import IdType, flat_tokens
from zeta_core.data.tokens.held_out import num_shared
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter

MAGIC_16, MAGIC_32 = (20240520, 1), (20240801, 7)


def random_ids(count: int, vocab_size: int, *, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, vocab_size, size=count)


def read(path: Path, lines: RecordedLines | None = None, **source: Any) -> TokenFile:
    options = parse(TrainerOptions, {"dataset": {"path": str(path), "format": "tokens", **source}})
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    return flat_tokens(sources, Reporter(lines or RecordedLines()))


def with_header(ids: NDArray[Any], dtype: str, magic: tuple[int, int], *, count: int | None = None) -> bytes:
    header = struct.pack("<3i", *magic, len(ids) if count is None else count)
    return header.ljust(1024, b"\0") + ids.astype(dtype).tobytes()


def index(lengths: list[int], bounds: list[int], code: int) -> bytes:
    """An index as Megatron-LM writes it."""
    pointers = np.cumsum([0, *lengths[:-1]]) * 4
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds))
    arrays = np.array(lengths, "<i4"), pointers.astype("<i8"), np.array(bounds, "<i8")
    return head + b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("vocab_size", [4, 300, 50257, 65536])
@pytest.mark.parametrize("count", [3, 20, 5000, 5001])
def test_a_file_of_16_bit_ids_needs_no_type(count: int, vocab_size: int, tmp_path: Path) -> None:
    ids = 1 + random_ids(count, vocab_size - 1)
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    assert read(tmp_path / "ids.bin").ids.tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", ["<u4", "<i4", "<i8", "<u8"])
@pytest.mark.parametrize("vocab_size", [10, 384, 50257, 128256, 262144])
def test_wider_ids_are_recognized(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    ids = random_ids(500, vocab_size)
    ids.astype(dtype).tofile(tmp_path / "ids.bin")
    lines = RecordedLines()
    tokens = read(tmp_path / "ids.bin", lines)
    assert (tokens.ids.tolist(), tokens.largest_id) == (ids.tolist(), ids.max())
    assert any(isinstance(line, LogLine) and "ids.bin is read as 500 ids of type" in line.message for line in lines.all)


@pytest.mark.parametrize(
    "content",
    [
        np.array([5, 6, 7], "<u4"),  # too few to prove anything
        np.array([5, 6], "<i8"),
        np.where(np.arange(400) % 2, -100, random_ids(400, 300)).astype("<i4"),
        np.where(np.arange(400) % 2, -100, random_ids(400, 300)).astype("<i8"),
        np.where(np.arange(400) % 9, random_ids(400, 300), 1 << 30).astype("<u4"),
        random_ids(400, 300).astype(">u4"),
    ],
)
def test_an_uncertain_type_is_rejected_with_the_field_to_set(content: NDArray[Any], tmp_path: Path) -> None:
    content.tofile(tmp_path / "ids.bin")
    with pytest.raises(InvalidData, match=r"ids\.bin does not state the type of its ids, and .*Set dataset\.dtype"):
        read(tmp_path / "ids.bin")


@pytest.mark.parametrize(("written", "named"), [("<u4", "uint32"), ("<i4", "int32"), ("<i8", "int64"), ("u1", "uint8")])
def test_the_spec_can_state_the_type(written: str, named: str, tmp_path: Path) -> None:
    ids = random_ids(7, 100)
    ids.astype(written).tofile(tmp_path / "ids.bin")
    assert read(tmp_path / "ids.bin", dtype=named).ids.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("written", "named", "message"),
    [
        ("<u4", "uint16", r"'uint16', but ids\.bin about every second 16-bit word is 0"),
        ("<i8", "uint16", r"'uint16', but ids\.bin about every second 16-bit word is 0"),
        ("<i8", "int32", r"'int32', but ids\.bin every second 32-bit number is 0"),
        ("<u4", "int64", r"contains \d+ as int64, which is not a token id; set dataset\.dtype"),
    ],
)
def test_a_stated_type_is_checked_against_the_contents(written: str, named: str, message: str, tmp_path: Path) -> None:
    random_ids(500, 300).astype(written).tofile(tmp_path / "ids.bin")
    with pytest.raises(InvalidData, match=message):
        read(tmp_path / "ids.bin", dtype=named)


@pytest.mark.parametrize(
    ("size", "dtype", "message"),
    [
        (101, None, "odd number of bytes"),
        (102, "uint32", "is not a multiple of"),
        (12, "int64", "is not a multiple of"),
    ],
)
def test_the_size_must_fit_the_type(size: int, dtype: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "ids.bin").write_bytes(bytes(range(1, size + 1)))
    with pytest.raises(InvalidData, match=message):
        read(tmp_path / "ids.bin", dtype=dtype)


@pytest.mark.parametrize(("dtype", "magic"), [("<u2", MAGIC_16), ("<u4", MAGIC_32), ("<u4", MAGIC_16)])
def test_a_header_of_llm_c_is_not_ids(dtype: str, magic: tuple[int, int], tmp_path: Path) -> None:
    ids = random_ids(500, 50000)
    (tmp_path / "ids.bin").write_bytes(with_header(ids, dtype, magic))
    tokens = read(tmp_path / "ids.bin")
    assert (tokens.ids.tolist(), tokens.ids.dtype) == (ids.tolist(), np.dtype(dtype))


def test_a_header_must_fit_the_file_and_the_spec(tmp_path: Path) -> None:
    path, ids = tmp_path / "ids.bin", random_ids(500, 50000)
    path.write_bytes(with_header(ids, "<u2", MAGIC_16, count=700))
    with pytest.raises(InvalidData, match=r"header of llm\.c for 700 ids, but 1,000 bytes of ids"):
        read(path)
    path.write_bytes(with_header(ids, "<u2", MAGIC_16))
    with pytest.raises(InvalidData, match=r"'uint32', but the header of llm\.c of ids\.bin means uint16"):
        read(path, dtype="uint32")
    path.write_bytes(with_header(ids, "<u2", (20240522, 1)))
    with pytest.raises(InvalidData, match="evaluation file of llm"):
        read(path)


def test_an_index_of_megatron_states_the_type_and_the_documents(tmp_path: Path) -> None:
    ids = random_ids(6, 300)
    ids.astype("<i4").tofile(tmp_path / "ids.bin")
    (tmp_path / "ids.idx").write_bytes(index([2, 1, 3], [0, 2, 3], code=4))
    tokens = read(tmp_path / "ids.bin")
    assert (tokens.ids.tolist(), tokens.offsets.tolist()) == (ids.tolist(), [0, 3, 6])
    (tmp_path / "ids.idx").write_bytes(index([2, 1, 4], [0, 2, 3], code=4))
    with pytest.raises(InvalidData, match=r"ids\.idx is not an index of Megatron-LM that matches ids\.bin"):
        read(tmp_path / "ids.bin")
    (tmp_path / "ids.idx").write_bytes(index([2, 1, 3], [0, 2, 3], code=7))
    with pytest.raises(InvalidData, match="declares the type float32"):
        read(tmp_path / "ids.bin")


def test_a_numpy_array_has_its_own_type(tmp_path: Path) -> None:
    path = tmp_path / "ids.NPY"
    with path.open("wb") as file:
        np.save(file, np.array([5, 6, 7], dtype="<i8"))
    assert read(path).ids.tolist() == [5, 6, 7]
    with pytest.raises(InvalidData, match=r"dataset\.dtype is 'uint16', but ids\.NPY contains int64"):
        read(path, dtype="uint16")
    with path.open("wb") as file:
        np.save(file, np.array([5.0, 6.0]))
    with pytest.raises(InvalidData, match="type float64; provide a vector of at least two integers"):
        read(path)


def test_16_bit_ids_do_not_fit_a_larger_vocabulary(tmp_path: Path) -> None:
    random_ids(500, 60000).astype("<u2").tofile(tmp_path / "ids.bin")
    tokens = read(tmp_path / "ids.bin")
    id_type = IdType.of(tokens)
    assert id_type is not None
    id_type.check(1 << 16)
    with pytest.raises(InvalidData, match=r"ids\.bin is read as uint16, which cannot represent the 65,537 ids"):
        id_type.check((1 << 16) + 1)
    np.save(tmp_path / "ids.npy", tokens.ids)
    assert IdType.of(read(tmp_path / "ids.npy")) is None, "the type is in the file"


def test_a_run_rejects_16_bit_ids_for_a_large_vocabulary(tmp_path: Path) -> None:
    random_ids(500, 60000).astype("<u2").tofile(tmp_path / "ids.bin")
    options: dict[str, Any] = {"dataset": {"path": str(tmp_path / "ids.bin")}, "use_pretokenized": True}
    with pytest.raises(InvalidData, match="cannot represent the 70,000 ids of the model's vocabulary"):
        train(llama(vocab_size=70000), tmp_path / "out", cache=tmp_path, max_steps=1, **options)


@pytest.mark.parametrize("train_on", ["assistant", "completion"])
def test_a_flat_file_does_not_mark_answers(train_on: TrainOn, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", random_ids(50, 300))
    options = parse(TrainerOptions, {"dataset": {"path": str(tmp_path / "ids.npy"), "format": "tokens"}})
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    with pytest.raises(InvalidData, match=f"train_on is '{train_on}', but flat files of ids do not mark"):
        prepare_tokens(sources, None, tmp_path, Reporter(), train_on=train_on)


def test_a_type_is_only_for_flat_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"dataset\.dtype is 'uint32'; it is the type of the ids in a \.bin file"):
        parse(TrainerOptions, {"dataset": {"path": "ids.bin", "dtype": "uint32"}})
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7]}\n')
    with pytest.raises(InvalidData, match=r"dataset\.dtype is 'uint32', but rows\.jsonl is not a \.bin file"):
        read(tmp_path / "rows.jsonl", dtype="uint32")
    np.save(tmp_path / "ids.npy", random_ids(50, 300))
    with pytest.raises(InvalidData, match=r"ids\.npy is a flat file of ids without columns"):
        read(tmp_path / "ids.npy", columns={"labels": "targets"})


def test_different_flat_files_are_not_copies(tmp_path: Path) -> None:
    for name, seed in (("train.bin", 1), ("val.bin", 2), ("copy.bin", 1)):
        random_ids(5000, 300, seed=seed).astype("<u2").tofile(tmp_path / name)
    train, val, copy = (read(tmp_path / name, dtype="uint16") for name in ("train.bin", "val.bin", "copy.bin"))
    assert (num_shared(train, val), num_shared(train, copy)) == (0, 1)
