"""Loading a model to answer: checkpoints as training loads them, and 4-bit bases with their adapter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.serve.stored_models import Store
from zeta_core.contract.wire.run_directory import MANIFEST_NAME
from zeta_core.failures import WeightsReplaced
from zeta_core.model.packed_layers import PackedLinear

IDS = torch.arange(3, 35)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_an_adapter_is_computed_on_its_base_as_peft_does(store: Store) -> None:
    from peft import PeftModel

    adapter = store.adapter()
    base = store.load(store.base).model
    before = logits(base)
    loaded = store.load(adapter, has_manifest=True)
    assert loaded.context_tokens == 256
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))  # pyright: ignore[reportArgumentType]
    assert not torch.allclose(logits(loaded.model), before, atol=1e-4)
    assert torch.equal(logits(loaded.model), expected)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_an_adapter_of_a_quantized_base_is_served_on_it(store: Store) -> None:
    adapter = store.adapter(quantize="nf4")
    loaded = store.load(adapter, has_manifest=True, quantize="nf4")
    layers = [part for part in loaded.model.modules() if isinstance(part, PackedLinear)]
    assert len(layers) == 14
    assert any("lora" in name for name, _ in loaded.model.named_parameters())
    base = store.load(store.base, quantize="nf4").model
    assert sum(isinstance(part, PackedLinear) for part in base.modules()) == 14
    assert (logits(base) - logits(loaded.model)).norm() > 0
    precise = store.load(adapter, has_manifest=True).model
    error = (logits(loaded.model) - logits(precise)).norm() / logits(precise).norm()
    assert 0 < error < 0.3  # that of nf4


def test_a_checkpoint_that_was_replaced_is_not_loaded(store: Store) -> None:
    (store.base / MANIFEST_NAME).write_text("{}")
    with pytest.raises(WeightsReplaced, match="replaced by a newer one"):
        store.load(store.base, has_manifest=True, fingerprint="0" * 64)
