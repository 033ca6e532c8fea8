"""Hub datasets: repositories with an owner, whose files are downloaded and read like uploaded files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import packaged_modules

from tests.harness.local_hub import LocalHub, local_hub
from tests.harness.ports import free_loopback_port
from tests.zeta_core.data.hub_reader import HubReader
from zeta import Trainer
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import is_hub_dataset
from zeta_core.contract.spec.sources import HubSource
from zeta_core.data.sandbox import MEBIBYTE
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.sources.hub import reject_foreign_files
from zeta_core.failures import InvalidData


@dataclass(frozen=True)
class Hub:
    """A local Hub, the folder of the client's cache, and a process that reads datasets from it."""

    server: LocalHub
    home: Path
    reader: HubReader

    def texts(self, hub: str, **source: Any) -> list[str]:
        result = self.reader.read(hub=hub, **source)
        assert "error" not in result, result["error"]
        return result["texts"]

    def error(self, hub: str, **source: Any) -> str:
        result = self.reader.read(hub=hub, **source)
        assert "error" in result, result["texts"]
        return result["error"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    home = tmp_path_factory.mktemp("hub")
    with local_hub() as server:
        reader = HubReader(server.environment(home))
        try:
            yield Hub(server, home, reader)
        finally:
            reader.close()


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubReader]:
    """A reader that requests a dataset from a port without a server; it retries while the other tests run."""
    home = tmp_path_factory.mktemp("unreachable")
    reader = HubReader({"HF_ENDPOINT": f"http://127.0.0.1:{free_loopback_port()}", "HF_HOME": str(home)})
    reader.send(hub="owner/distant")
    yield reader
    reader.close()


def parquet_of(texts: Sequence[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts)}), file, compression="zstd")
    return file.getvalue()


def lines_of(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def card_of(*configs: dict[str, Any]) -> bytes:
    return f"---\n{json.dumps({'configs': list(configs)})}\n---\n# A dataset\n".encode()


# --- Reading ----------------------------------------------------------------------------------------------------------

TABLES = {
    "README.md": b"---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n---\n",
    "data/train-00000-of-00002.parquet": parquet_of(["a", "b", "c"]),
    "data/train-00001-of-00002.parquet": parquet_of(["d", "e"]),
    "data/test-00000-of-00001.parquet": parquet_of(["x", "y"]),
}
LINES = {"train.jsonl": lines_of(["a", "b", "c", "d", "e"]), "test.jsonl": lines_of(["x", "y"])}


@pytest.mark.extended
@pytest.mark.parametrize("files", [TABLES, LINES], ids=["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "abcde"),
        ("test", "xy"),
        ("all", "abcdexy"),
        ("test+train", "xyabcde"),
        ("train[:2]", "ab"),
        ("train[2:4]", "cd"),
        ("train[-1:]", "e"),
        ("train[:40%]", "ab"),
        ("train[80%:] + test[:50%]", "ex"),
    ],
)
def test_splits_and_slices_select_rows(hub: Hub, files: dict[str, bytes], split: str, expected: str) -> None:
    hub.server.add_dataset("owner/letters", files)
    assert hub.texts("owner/letters", split=split) == list(expected)


@pytest.mark.extended
def test_only_files_of_the_requested_split_are_downloaded(hub: Hub) -> None:
    hub.server.add_dataset("owner/large", {"train.jsonl": lines_of(["a"]), "test.jsonl": lines_of(["b"])})
    assert hub.texts("owner/large", split="test") == ["b"]
    downloaded = [path for path in hub.server.requests if path.startswith("/datasets/owner/large/")]
    assert any(path.endswith("test.jsonl") for path in downloaded)
    assert not any(path.endswith("train.jsonl") for path in downloaded)


@pytest.mark.extended
def test_a_config_selects_its_files(hub: Hub) -> None:
    card = card_of(
        {"config_name": "plain", "data_files": "a.jsonl"},
        {"config_name": "other", "data_files": [{"split": "dev", "path": "b.jsonl"}]},
    )
    hub.server.add_dataset("owner/configs", {"README.md": card, "a.jsonl": lines_of(["a"]), "b.jsonl": lines_of(["b"])})
    assert hub.texts("owner/configs", config="plain") == ["a"]
    assert hub.texts("owner/configs", config="other", split="dev") == ["b"]
    assert "['plain', 'other']" in hub.error("owner/configs")
    assert "'third' not found" in hub.error("owner/configs", config="third")


def test_a_text_file_on_the_hub_is_one_document(hub: Hub) -> None:
    hub.server.add_dataset("owner/poem", {"train.txt": b"one\ntwo\n"})
    assert hub.texts("owner/poem") == ["one\ntwo\n"]
    assert "owner/poem/train.txt is a text file" in hub.error("owner/poem", split="train[:1]")


@pytest.mark.extended
def test_an_unchanged_commit_and_slice_keep_the_fingerprint(hub: Hub) -> None:
    def fingerprints(split: str) -> list[str]:
        return hub.reader.read(hub="owner/moving", split=split)["fingerprints"]

    hub.server.add_dataset("owner/moving", {"train.jsonl": lines_of(["a", "b"])})
    whole, sliced = fingerprints("train"), fingerprints("train[:1]")
    assert whole == fingerprints("train[:2]") == fingerprints("train")
    assert sliced == fingerprints("train[:50%]")
    assert sliced != whole
    hub.server.add_dataset("owner/moving", {"train.jsonl": lines_of(["a", "c"])})
    assert fingerprints("train") != whole


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_a_small_file_with_huge_rows_exceeds_the_memory_limit(hub: Hub) -> None:
    """The rows take 512 MiB, but Parquet stores equal values once."""
    bomb = parquet_of(["a" * (8 * MEBIBYTE)] * 64)
    assert len(bomb) < MEBIBYTE // 4
    hub.server.add_dataset("owner/small", {"train.jsonl": lines_of(["a"])})
    hub.server.add_dataset("owner/bomb", {"train.parquet": bomb})
    before = hub.reader.read(hub="owner/small")["peak_memory_bytes"]
    result = hub.reader.read(hub="owner/bomb")
    assert "owner/bomb/train.parquet" in result["error"]
    assert "requires more than 400 MiB of memory" in result["error"]
    assert result["peak_memory_bytes"] - before < 100 * MEBIBYTE
    assert sum(file.stat().st_size for file in hub.home.rglob("*") if file.is_file()) < 8 * MEBIBYTE


def test_a_damaged_file_is_named(hub: Hub) -> None:
    hub.server.add_dataset("owner/damaged", {"train.parquet": parquet_of(["a"])[:-3]})
    assert "owner/damaged/train.parquet is not readable as parquet" in hub.error("owner/damaged")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"split": "dev"}, "has no split 'dev'; choose from train, test."),
        ({"split": "train+dev[:1]"}, "has no split 'dev'; choose from train, test."),
        ({"split": "train[1"}, "dataset.split is 'train[1', which is not valid"),
        ({"split": "train[9:]"}, "dataset.split is 'train[9:]', which contains no rows"),
        ({"revision": "v9"}, "'owner/rejected' cannot be loaded"),
    ],
)
def test_a_split_or_revision_that_does_not_exist_is_rejected(hub: Hub, source: dict[str, str], expected: str) -> None:
    hub.server.add_dataset("owner/rejected", LINES)
    assert expected in hub.error("owner/rejected", **source)


def test_a_dataset_that_does_not_exist_is_rejected(hub: Hub) -> None:
    assert "'owner/missing' doesn't exist on the Hub" in hub.error("owner/missing")


def test_a_dataset_of_empty_files_is_rejected(hub: Hub) -> None:
    hub.server.add_dataset("owner/empty", {"train.jsonl": b""})
    assert "The split 'train' of the dataset 'owner/empty' contains no data" in hub.error("owner/empty")


def test_unsupported_files_are_rejected_before_they_are_downloaded(hub: Hub) -> None:
    hub.server.add_dataset("owner/images", {"train/a.png": b"\x89PNG", "train/b.png": b"\x89PNG"})
    assert "contains 'train/a.png', which is not a supported file type; use a dataset with .jsonl" in hub.error(
        "owner/images"
    )
    assert not any("/resolve/" in path and path.endswith(".png") for path in hub.server.requests)


def test_options_in_the_card_that_change_the_rows_are_rejected(hub: Hub) -> None:
    card = card_of({"config_name": "default", "data_files": "a.parquet", "columns": ["title"]})
    hub.server.add_dataset("owner/options", {"README.md": card, "a.parquet": parquet_of(["a"])})
    assert "The card of the dataset 'owner/options' sets 'columns' for reading its files" in hub.error("owner/options")


@pytest.mark.extended
def test_a_hub_that_cannot_be_reached_is_reported(unreachable: HubReader) -> None:
    error = unreachable.receive()["error"]
    assert error.startswith("The dataset 'owner/distant' cannot be loaded, because the Hub cannot be reached")


# --- Local and foreign files ------------------------------------------------------------------------------------------


def test_a_card_that_names_local_files_is_rejected(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    card = card_of({"config_name": "default", "data_files": str(tmp_path / "secret.txt")})
    hub.server.add_dataset("owner/thief", {"README.md": card, "a.txt": b"own"})
    assert "Data files don't belong to owner/thief" in hub.error("owner/thief")


def test_a_card_that_names_files_of_another_dataset_is_rejected(hub: Hub) -> None:
    hub.server.add_dataset("owner/private", {"train.txt": b"private"})
    card = card_of({"config_name": "default", "data_files": "hf://datasets/owner/private@main/train.txt"})
    hub.server.add_dataset("owner/borrower", {"README.md": card, "a.txt": b"own"})
    assert "Data files don't belong to owner/borrower" in hub.error("owner/borrower")


@pytest.mark.parametrize(
    ("file", "is_own"),
    [
        ("hf://datasets/owner/name@0a1b/data/train-00000.parquet", True),
        ("hf://datasets/owner/name@refs%2Fconvert%2Fparquet/default/train/0000.parquet", True),
        ("hf://datasets/other/name@0a1b/train.parquet", False),
        ("hf://datasets/owner/name@0a1b/../../x", False),
        ("zip://a.csv::/srv/data.zip", False),
        ("/etc/passwd", False),
        ("https://host/x", False),
    ],
)
def test_the_files_of_a_dataset_are_those_of_its_repository(file: str, is_own: bool) -> None:
    if is_own:
        reject_foreign_files({"train": [file]}, "owner/name")
    else:
        with pytest.raises(InvalidData, match="not one of its own files"):
            reject_foreign_files({"train": [file]}, "owner/name")


def test_packaged_builders_are_not_hub_datasets() -> None:
    names = list(vars(packaged_modules)["_PACKAGED_DATASETS_MODULES"])
    assert {"text", "json", "csv", "parquet", "arrow", "imagefolder", "webdataset"} <= set(names)
    assert not [name for name in names if is_hub_dataset(name)]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"hub": "text"}, "dataset.hub is 'text': it must be a dataset on the Hub, 'owner/name'"),
        ({"hub": "squad"}, "dataset.hub is 'squad': it must be a dataset on the Hub, 'owner/name'"),
        ({"hub": "a/b", "revision": "../x"}, "dataset.revision is '../x': it must be a plain name"),
    ],
)
def test_scripts_name_hub_datasets_with_their_owner(
    dataset: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret " * 1000)
    with pytest.raises(InvalidRequest, match=f"^{re.escape(message)}"):
        Trainer(1, 1, 8, None, lambda: None, dataset=dataset, output_dir=str(tmp_path / "out"))


def test_a_local_folder_of_the_same_name_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("secret")
    with pytest.raises(InvalidData, match=r"dataset.hub is 'owner/name', which is also a local folder"):
        open_sources([HubSource(hub="owner/name")], SourceLocations(any_path=True), pretokenized=False)
