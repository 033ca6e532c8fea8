"""The locations that the data and models of a spec may be read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zeta_core.contract.spec.resolved_spec import UploadedFile
from zeta_core.contract.wire.run_directory import RunFile


@dataclass(frozen=True)
class SourceLocations:
    """The locations of sources that a run may read.

    With ``any_path`` (in the user's own script), ``path`` may name any file. ``bases`` are the models that an adapter
    may name as its base, because the run that wrote the adapter's files isn't trusted; ``None``: any model. Without
    ``fetch_weights``, a model is built from its config, and only that and its tokenizer are fetched.
    """

    files: Mapping[str, UploadedFile] = field(default_factory=dict[str, UploadedFile])
    artifacts_root: Path | None = None
    data_root: Path | None = None
    any_path: bool = False
    allow_hub: bool = True
    bases: frozenset[str] | None = None
    fetch_weights: bool = True

    @classmethod
    def of_run(cls, file: RunFile, *, fetch_weights: bool = True) -> SourceLocations:
        """The locations that the job of a run file may read."""
        return cls(
            files=file.resolved_spec.files,
            artifacts_root=Path(file.artifacts_root),
            data_root=None if file.data_root is None else Path(file.data_root),
            allow_hub=file.hub,
            bases=frozenset(file.bases),
            fetch_weights=fetch_weights,
        )
