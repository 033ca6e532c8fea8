"""Training on objects of the library `datasets`: their rows are written to a file, which is read like any other.

The file is named by its content, so the processes of one run share it, and a resumed run finds the same data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from zeta_core.contract.errors import InvalidSpec
from zeta_core.system.data_folder import Split
from zeta_core.system.durable_files import flush, rename_durably

_BATCH_ROWS = 1000
_HELD_OUT = ("validation", "valid", "dev", "eval", "test")


def is_dataset_object(value: object) -> bool:
    """Whether the value is a dataset of `datasets`. The check does not import the library."""
    names = {"Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict"}
    return any(base.__module__.split(".")[0] == "datasets" and base.__name__ in names for base in type(value).__mro__)


def stored_dataset(value: object, cache: Path, field: str, split: Split) -> tuple[Path, str]:
    """The file with the rows of a dataset, and a message that states what is used. Raises `InvalidSpec`."""
    name, unused = "", ""
    if isinstance(value, Mapping):
        splits = cast("Mapping[str, Any]", value)
        name = _chosen_split(splits, field, split)
        unused = ", ".join(other for other in splits if other != name)
        value = splits[name]
    if not hasattr(value, "num_rows") or not hasattr(value, "with_format"):
        raise InvalidSpec(
            f"{field} is an IterableDataset, whose rows have no fixed order; give a Dataset, such as "
            "Dataset.from_list(list(data)), or the name of the files.",
            param=field,
        )
    dataset: Any = value
    if dataset.num_rows == 0:
        raise InvalidSpec(f"{field} is a Dataset without rows; give one with at least one row.", param=field)
    folder = cache / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{os.getpid()}.part"
    try:
        with temporary.open("wb") as file:
            digest = _write(dataset, file)
        target = folder / digest / f"{name or 'dataset'}.arrow"
        target.parent.mkdir(exist_ok=True)
        flush(temporary)
        rename_durably(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    rows = "1 row" if dataset.num_rows == 1 else f"{dataset.num_rows:,} rows"
    used = f"the split {name!r} of the DatasetDict" if name else "the Dataset"
    rest = f" Not used: {unused}." if unused else ""
    return target, f"{field}: using {used} ({rows}).{rest}"


def _chosen_split(splits: Mapping[str, Any], field: str, split: Split) -> str:
    """The split to use. Raises `InvalidSpec` if it is ambiguous."""
    if split == "train" and "train" in splits:
        return "train"
    if split == "held_out" and (found := [name for name in _HELD_OUT if name in splits]):
        return found[0]
    names = ", ".join(splits) or "none"
    example = next(iter(splits), "train")
    wanted = "train" if split == "train" else "validation"
    raise InvalidSpec(
        f"{field} is a DatasetDict without the split {wanted!r} (it has: {names}); give one of them, such as "
        f"{field}=data[{example!r}].",
        param=field,
    )


class _Hashing:
    """A file that also computes the hash of the written bytes."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write(dataset: Any, file: BinaryIO) -> str:
    """Write the rows as an Arrow stream, and return its SHA-256."""
    import pyarrow as pa

    out = _Hashing(file)
    writer: Any = None
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        plain = table.replace_schema_metadata(None)
        writer = writer or pa.ipc.new_stream(cast(Any, out), plain.schema)
        writer.write_table(plain)
    writer.close()
    return out.hash.hexdigest()
