"""Loading a model to answer: checkpoints as training loads them, and 4-bit bases with their adapter."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from tests.zeta_core.models import llama
from tests.zeta_core.runs import train
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.wire.answers import ServedWeights, ServeFile
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import WeightsReplaced
from zeta_core.serve.loading import LoadedModel, load

IDS = torch.arange(3, 35)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


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

    def adapter(self, **lora: Any) -> Path:
        """The checkpoint of an adapter that was trained on the base."""
        from zeta_core.contract.spec.sources import JobModel

        locations = SourceLocations(artifacts_root=self.root)
        model = JobModel(**self.source(self.base))
        output = self.root.parent / "output"
        train(model, output, cache=self.cache, locations=locations, max_steps=2, lora={"r": 4, **lora})
        stored = self.new_folder()
        stored.parent.mkdir(parents=True)
        (output / "final").rename(stored)
        return stored

    def load(self, folder: Path, **fields: Any) -> LoadedModel:
        fingerprint = hashlib.sha256(b"another").hexdigest()
        if (folder / MANIFEST_NAME).is_file():
            fingerprint = hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
        source: Any = self.source(folder)
        weights: dict[str, Any] = {"name": folder.name, "project": "p", "model": source, "fingerprint": fingerprint}
        served = ServedWeights.model_validate({**weights, **fields})
        return load(ServeFile(weights=served, artifacts_root=str(self.root), cache_dir=str(self.cache)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_an_adapter_is_merged_into_its_base(store: Store) -> None:
    from peft import PeftModel

    adapter = store.adapter()
    base = store.load(store.base).model
    before = logits(base)
    loaded = store.load(adapter, has_manifest=True)
    assert loaded.context_tokens == 256
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))  # pyright: ignore[reportArgumentType]
    assert not torch.allclose(logits(loaded.model), before, atol=1e-4)
    torch.testing.assert_close(logits(loaded.model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_adapter_of_a_quantized_base_is_served_on_it(store: Store) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    adapter = store.adapter(quantize="nf4")
    loaded = store.load(adapter, has_manifest=True, quantize="nf4")
    layers = [part for part in loaded.model.modules() if isinstance(part, Linear4bit)]
    assert len(layers) == 14
    assert any("lora" in name for name, _ in loaded.model.named_parameters())
    merged = store.load(adapter, has_manifest=True).model
    error = (logits(loaded.model) - logits(merged)).norm() / logits(merged).norm()
    assert 0 < error < 0.3  # that of nf4


def test_a_checkpoint_that_was_replaced_is_not_loaded(store: Store) -> None:
    (store.base / MANIFEST_NAME).write_text("{}")
    with pytest.raises(WeightsReplaced, match="replaced by a newer one"):
        store.load(store.base, has_manifest=True, fingerprint="0" * 64)
