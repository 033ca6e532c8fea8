"""Stored checkpoints of small models, and loading them as a serving process does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from tests.zeta_core.models import llama
from tests.zeta_core.runs import train
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.spec.sources import JobModel
from zeta_core.contract.wire.answers import ServedWeights, ServeFile
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.serve.loading import LoadedModel, load


class Store:
    """An artifact store with a base model, which is a job's checkpoint as well."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "artifacts"
        self.cache = folder / "cache"
        self.base = self.new_folder()
        model: Any = llama(hidden_size=64, intermediate_size=192)
        model.save_pretrained(self.base)
        byte_tokenizer(CHATML).save_pretrained(self.base)

    def new_folder(self) -> Path:
        return self.root / checkpoint_key(new_id("job"), "final")

    def source(self, folder: Path) -> dict[str, str]:
        return {"job": folder.parent.parent.name, "checkpoint": folder.name}

    def adapter(self, *, steps: int = 2, options: dict[str, Any] | None = None, **lora: Any) -> Path:
        """The checkpoint of an adapter that was trained on the base."""
        locations = SourceLocations(artifacts_root=self.root)
        model = JobModel(**self.source(self.base))
        output = self.root.parent / "output"
        train(
            model,
            output,
            cache=self.cache,
            locations=locations,
            max_steps=steps,
            lora={"r": 4, **lora},
            **(options or {}),
        )
        stored = self.new_folder()
        stored.parent.mkdir(parents=True)
        (output / "final").rename(stored)
        return stored

    def load(self, folder: Path, **fields: Any) -> LoadedModel:
        return load(self.serve_file(folder, **fields))

    def serve_file(self, folder: Path, **fields: Any) -> ServeFile:
        fingerprint = hashlib.sha256(b"another").hexdigest()
        if (folder / MANIFEST_NAME).is_file():
            fingerprint = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
        source: Any = self.source(folder)
        weights: dict[str, Any] = {"name": folder.name, "project": "p", "model": source, "fingerprint": fingerprint}
        weights["bases"] = [f"{self.base.parent.parent.name}/{self.base.name}"]
        served = ServedWeights.model_validate({**weights, **fields})
        return ServeFile(weights=served, artifacts_root=str(self.root), cache_dir=str(self.cache))
