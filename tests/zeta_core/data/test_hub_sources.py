"""Data sets of the Hub are repositories with an owner; none of them reads files of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset_builder, packaged_modules

from zeta import Trainer
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.identifiers import is_hub_dataset
from zeta_core.contract.sources import HubSource
from zeta_core.data.sources import Places, open_sources, refuse_foreign_files
from zeta_core.failures import InvalidData


def test_no_packaged_builder_is_a_data_set_of_the_hub() -> None:
    names = list(vars(packaged_modules)["_PACKAGED_DATASETS_MODULES"])
    assert {"text", "json", "csv", "parquet", "arrow", "imagefolder", "webdataset"} <= set(names)
    assert not [name for name in names if is_hub_dataset(name)]


@pytest.mark.parametrize("dataset", [{"hub": "text"}, {"hub": "squad"}, {"hub": "a/b", "revision": "../x"}])
def test_a_script_names_them_with_their_owner_too(
    dataset: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret " * 1000)
    with pytest.raises(InvalidRequest, match=r"dataset\.(hub|revision) is ") as raised:
        Trainer(1, 1, 8, None, lambda: None, dataset=dataset, output_dir=str(tmp_path / "out"))
    assert "is 'text': it must be 'owner/name'" in str(raised.value) or dataset["hub"] != "text"


def test_a_folder_of_that_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("secret")
    with pytest.raises(InvalidData, match=r"dataset.hub is 'owner/name', which is also a local folder"):
        open_sources([HubSource(hub="owner/name")], Places(any_path=True), pretokenized=False)


def test_a_card_that_names_files_of_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads an absolute path in the card of a repository as one of this machine; here it is a folder's."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    builder = load_dataset_builder("text", data_files={"train": str(secret)}, cache_dir=str(tmp_path / "cache"))
    assert builder.config.data_files

    def load(*_: object, **__: object) -> object:
        return builder

    monkeypatch.setattr("datasets.load_dataset_builder", load)
    with pytest.raises(InvalidData, match=r"refers to '.*secret.txt', which is not one of its own files"):
        open_sources([HubSource(hub="owner/name")], Places(), pretokenized=False)


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
def test_the_files_of_a_data_set_are_those_of_its_repository(file: str, is_own: bool) -> None:
    if is_own:
        refuse_foreign_files({"train": [file]}, "owner/name")
    else:
        with pytest.raises(InvalidData, match="not one of its own files"):
            refuse_foreign_files({"train": [file]}, "owner/name")
