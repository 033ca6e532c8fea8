"""Datasets of the library `datasets`: objects given to the Trainer, and folders written by `save_to_disk`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from tests.zeta_core.models import plain
from zeta import Trainer
from zeta_core.contract.data_files.file_types import file_suffixes
from zeta_core.contract.errors import InvalidSpec
from zeta_core.data.sources.dataset_objects import stored_dataset
from zeta_core.system.data_folder import find_data_files

TEXTS = [f"Sentence {number} of the data." for number in range(8)]


def train(folder: Path, **options: Any) -> Any:
    return Trainer(
        model=plain(), batch_size=2, gradient_accumulate_every=1, seq_len=64, max_steps=1, output_dir=folder, **options
    )


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))


def with_length(row: dict[str, Any]) -> dict[str, int]:
    return {"n": len(row["text"])}


def rows_in(path: Path) -> list[str]:
    return Dataset.from_file(str(path))["text"][:]


def test_a_dataset_is_trained_on_with_its_selection(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    selected = Dataset.from_dict({"text": TEXTS, "id": range(8)}).select([5, 0, 3])
    assert train(tmp_path / "out", dataset=selected).steps == 1
    messages = "".join(capfd.readouterr())
    assert "dataset: using the Dataset (3 rows)." in messages
    assert "Columns of the data that are not used: id." in messages
    path, _ = stored_dataset(selected, tmp_path / "cache", "dataset", "train")
    assert rows_in(path) == [TEXTS[5], TEXTS[0], TEXTS[3]]
    assert stored_dataset(selected, tmp_path / "cache", "dataset", "train")[0] == path


def test_only_the_train_split_of_a_dict_is_trained_on(tmp_path: Path) -> None:
    both = DatasetDict({"train": Dataset.from_dict({"text": TEXTS}), "test": Dataset.from_dict({"text": ["held out"]})})
    path, note = stored_dataset(both, tmp_path, "dataset", "train")
    assert (rows_in(path), note) == (
        TEXTS,
        "dataset: using the split 'train' of the DatasetDict (8 rows). Not used: test.",
    )
    path, _ = stored_dataset(both, tmp_path, "eval_dataset", "held_out")
    assert rows_in(path) == ["held out"]
    del both["train"]
    with pytest.raises(InvalidSpec, match=r"without the split 'train' \(it has: test\).*dataset=data\['test'\]"):
        train(tmp_path / "out", dataset=both)


def test_columns_of_a_dataset_can_be_named(tmp_path: Path) -> None:
    source = {"path": Dataset.from_dict({"body": TEXTS}), "columns": {"text": "body"}}
    assert train(tmp_path / "out", dataset=source, eval_dataset=source).steps == 1


def test_datasets_without_fixed_rows_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="is an IterableDataset"):
        train(tmp_path / "out", dataset=Dataset.from_dict({"text": TEXTS}).to_iterable_dataset())
    with pytest.raises(InvalidSpec, match="is a Dataset without rows"):
        train(tmp_path / "out", dataset=Dataset.from_dict({"text": []}))


def test_a_saved_dataset_is_read_without_caches_and_earlier_files(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    Dataset.from_dict({"text": TEXTS}).save_to_disk(saved)
    dataset: Any = load_from_disk(saved)
    dataset.map(with_length, load_from_cache_file=False)
    dataset.map(with_length, cache_file_name=str(saved / "counted.arrow"))
    found = find_data_files(saved, file_suffixes("auto"))
    assert [path.name for path in found.used] == ["data-00000-of-00001.arrow"]
    assert {"counted.arrow": "not a file of the saved dataset"}.items() <= {
        skipped.path: skipped.reason for skipped in found.skipped
    }.items()
