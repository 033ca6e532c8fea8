"""Finding and downloading the data files of Hub datasets.

`datasets` only determines which files belong to each split, from the dataset's card and from file names. It does so in
a sandboxed process, because both are untrusted. It never prepares a dataset, because that decodes every row in the
training process and writes all rows to disk. Only the files of the requested splits are downloaded. They are read like
uploaded files, so files of other types are rejected before they are downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from zeta_core.contract.data_files.file_types import DELIMITERS, file_type, listed
from zeta_core.contract.spec.sources import HubSource
from zeta_core.data.sandbox import Position, run_in_sandbox
from zeta_core.failures import InvalidData

_SCHEME = "hf://datasets/"
_CONVERTED = "refs/convert/parquet"  # the branch to which the Hub converts datasets
# Fields of the configs of `datasets` that do not change which rows the files contain.
_HARMLESS_OPTIONS = frozenset({"name", "version", "data_dir", "data_files", "description", "batch_size", "chunksize"})


@dataclass(frozen=True)
class HubFile:
    """A downloaded file: its name for messages, its path on this machine, and its repository, commit and path there."""

    name: str
    path: Path
    origin: str


@dataclass(frozen=True)
class HubDataset:
    """The files of the requested splits, in order, without empty files."""

    files: Mapping[str, Sequence[HubFile]]
    ranges: str  # the requested splits, possibly sliced, with "all" replaced by the names of all splits

    @property
    def is_sliced(self) -> bool:
        return "[" in self.ranges

    @property
    def splits(self) -> list[str]:
        """The requested splits in order; one may be requested several times."""
        return _split_names(self.ranges)

    def slices(self, num_rows: Mapping[str, int]) -> list[tuple[str, int, int]]:
        """The requested slices: the split, and the numbers of rows before its first and up to its last row."""
        from datasets import ReadInstruction

        try:
            found: Any = ReadInstruction.from_spec(self.ranges).to_absolute(dict(num_rows))
        except (ValueError, AssertionError) as error:
            raise InvalidData(f"dataset.split is {self.ranges!r}, which is not valid: {_reason(error)}") from error
        return [
            (part.splitname, part.from_ or 0, num_rows[part.splitname] if part.to is None else part.to)
            for part in found
        ]


def fetch_dataset(source: HubSource, suffixes: Sequence[str]) -> HubDataset:
    """Download the files of the requested splits, which must have one of ``suffixes``. Raises `InvalidData`."""
    importlib.import_module("datasets")  # imported once in this process instead of in every forked process
    available: dict[str, list[str]] = run_in_sandbox(lambda position: _find_files(source, position))
    ranges = "+".join(available) if source.split == "all" else source.split
    splits = list(dict.fromkeys(_split_names(ranges)))
    if unknown := next((split for split in splits if split not in available), None):
        raise InvalidData(
            f"dataset.split is {source.split!r}, but the dataset {source.hub!r} has no split {unknown!r}; choose from "
            f"{', '.join(available)}."
        )
    for split in splits:
        _check_suffixes(source, available[split], suffixes)
    return HubDataset({split: _download(source.hub, split, available[split]) for split in splits}, ranges)


def reject_foreign_files(data_files: Mapping[str, Sequence[str]], hub: str) -> None:
    """Raise `InvalidData` if the dataset's card names files outside the dataset, such as local files."""
    for file in (str(name) for names in data_files.values() for name in names):
        if not file.startswith(f"{_SCHEME}{hub}@") or ".." in PurePosixPath(file).parts or "::/" in file:
            raise InvalidData(
                f"The dataset {hub!r} refers to {file!r}, which is not one of its own files; use another dataset."
            )


def _find_files(source: HubSource, position: Position) -> dict[str, list[str]]:
    """The URLs of the files of each split."""
    from datasets import load_dataset_builder

    position.move(f"The list of files of the dataset {source.hub!r}", "reading")
    try:
        builder: Any = load_dataset_builder(source.hub, source.config, revision=source.revision)
    except MemoryError:
        raise
    except ConnectionError as error:
        raise _unreachable(source, _reason(error)) from error
    except Exception as error:
        raise InvalidData(f"The dataset {source.hub!r} cannot be loaded: {_reason(error)}") from error
    if type(builder).__module__.startswith("datasets.packaged_modules.cache"):  # a copy that `datasets` once prepared
        raise _unreachable(source, "only a prepared copy was found")
    files: Mapping[str, Sequence[str]] = getattr(builder.config, "data_files", None) or {}
    reject_foreign_files(files, source.hub)
    if options := _options(builder.config, files):
        raise InvalidData(
            f"The card of the dataset {source.hub!r} sets {', '.join(map(repr, options))} for reading its files, which "
            "is not supported; use another dataset.config, or upload the data as a file."
        )
    return {str(split): [str(file) for file in names] for split, names in files.items()}


def _unreachable(source: HubSource, reason: str) -> InvalidData:
    return InvalidData(
        f"The dataset {source.hub!r} cannot be loaded, because the Hub cannot be reached ({reason}); check the network "
        "connection, HF_ENDPOINT and HF_HUB_OFFLINE."
    )


def _options(config: Any, files: Mapping[str, Sequence[str]]) -> list[str]:
    """The options in the dataset's card that change its rows, such as a selection of columns."""
    default: Any = type(config)()
    names = [field.name for field in fields(config) if field.name not in _HARMLESS_OPTIONS]
    changed = [name for name in names if getattr(config, name) != getattr(default, name)]
    suffixes = {file_type(PurePosixPath(file).name).suffix for several in files.values() for file in several}
    if len(suffixes) == 1 and getattr(config, "sep", None) == DELIMITERS.get(suffixes.pop()):
        changed = [name for name in changed if name != "sep"]  # the separator by which these files are read anyway
    return changed


def _split_names(ranges: str) -> list[str]:
    return [part.partition("[")[0].strip() for part in ranges.split("+")]


def _check_suffixes(source: HubSource, urls: Sequence[str], suffixes: Sequence[str]) -> None:
    for url in urls:
        if file_type(PurePosixPath(url).name).suffix not in suffixes:
            raise InvalidData(
                f"The dataset {source.hub!r} contains {_path_in(url)!r}, which is not a supported file type; use a "
                f"dataset with {listed(suffixes)} files. If the Hub has converted the dataset to Parquet, set "
                f"dataset.revision to {_CONVERTED!r}."
            )


def _download(hub: str, split: str, urls: Sequence[str]) -> list[HubFile]:
    from huggingface_hub import hf_hub_download

    found: list[HubFile] = []
    for url in urls:
        commit, path = unquote(url.removeprefix(f"{_SCHEME}{hub}@").partition("/")[0]), _path_in(url)
        try:
            local = Path(hf_hub_download(hub, path, repo_type="dataset", revision=commit))
        except Exception as error:
            raise InvalidData(
                f"The file {path!r} of the dataset {hub!r} cannot be downloaded: {_reason(error)}"
            ) from error
        if local.stat().st_size:
            found.append(HubFile(f"{hub}/{path}", local, f"{hub}@{commit}/{path}"))
    if not found:
        raise InvalidData(f"The split {split!r} of the dataset {hub!r} contains no data; use another split.")
    return found


def _path_in(url: str) -> str:
    """The path inside the repository of a URL such as ``hf://datasets/owner/name@commit/path``."""
    return url.partition("@")[2].partition("/")[2]


def _reason(error: Exception) -> str:
    """The error's message on one line; some messages list every file type that exists."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
