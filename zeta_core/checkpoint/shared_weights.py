"""The weights of a sharded model, which all ranks write and the first one exports, without holding them in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from zeta_core.checkpoint.row_file import Rows, create_row_file, write_rows
from zeta_core.checkpoint.staging import Tensors
from zeta_core.checkpoint.training_state import WEIGHTS_FILE

_TRAINED, _EXPORTED = "trained-rows.safetensors", "exported-rows.safetensors"


@dataclass(frozen=True)
class SharedWeights:
    """Files in ``folder`` with the weights in training precision and, if it differs, in ``export_dtype``.

    The first rank calls `create`, then every rank calls `write`. After all ranks have written, the first rank reads
    the weights, which map the files, and calls `keep`.
    """

    folder: Path
    rows: Mapping[str, Rows]
    export_dtype: torch.dtype | None

    @property
    def _converts(self) -> bool:
        return any(part.converted(self.export_dtype) != part.dtype for part in self.rows.values())

    def create(self) -> None:
        create_row_file(self.folder / _TRAINED, self.rows, None)
        if self._converts:
            create_row_file(self.folder / _EXPORTED, self.rows, self.export_dtype)

    def write(self) -> None:
        write_rows(self.folder / _TRAINED, self.rows, None)
        if self._converts:
            write_rows(self.folder / _EXPORTED, self.rows, self.export_dtype)

    def trained(self) -> Tensors:
        return load_file(self.folder / _TRAINED)

    def exported(self) -> Tensors:
        return load_file(self.folder / (_EXPORTED if self._converts else _TRAINED))

    def keep(self, names: Collection[str]) -> bool:
        """Keep the trained weights as the file of the training state if they are ``names``; otherwise, remove them.

        Returns whether they were kept.
        """
        (self.folder / _EXPORTED).unlink(missing_ok=True)
        if set(names) == set(self.rows):
            (self.folder / _TRAINED).rename(self.folder / WEIGHTS_FILE)
            return True
        (self.folder / _TRAINED).unlink()
        return False
