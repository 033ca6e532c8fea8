"""The loss in chunks of logits: the same losses and gradients as with all logits, for every kind of output head."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.zeta_core import models
from tests.zeta_core.data.token_files import random_documents
from tests.zeta_core.objective.small_families import ISOLATED, NOT_ISOLATED, build
from tests.zeta_core.parallel.test_parallel import case, results
from tests.zeta_core.run_directories import ROOT
from zeta_core.contract.spec.options import Lora
from zeta_core.data.sequences import MicroBatch, Sequences
from zeta_core.model.lora import add_adapter
from zeta_core.objective import chunked_loss
from zeta_core.objective.loss import LossFunction
from zeta_core.objective.loss_probe import find_loss_function
from zeta_core.objective.preference import preference_loss

SAMPLE = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_LOGITS", 10 * models.VOCABULARY)


def some_batch() -> MicroBatch:
    """Packed documents, whose last row is a filler without targets."""
    return Sequences(random_documents([9, 40, 7, 30, 42]), 32, pack=True).batch(np.arange(3), 2)


def gradients(
    model: nn.Module, loss_function: LossFunction, batch: MicroBatch
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss, auxiliary = loss_function(model, batch)
    (loss / batch.num_targets + (0 if auxiliary is None else auxiliary)).backward()
    return loss.detach(), [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(model: nn.Module, loss_function: LossFunction, batch: MicroBatch) -> None:
    """In chunks and with all logits, the losses and gradients agree to 1e-6."""
    assert loss_function.uses_chunks(batch)
    loss, found = gradients(model, loss_function, batch)
    correct = loss_function.take_sums()
    whole_loss, expected = gradients(model, replace(loss_function, head=None), batch)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(correct, loss_function.take_sums())
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, expected_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6 * max(1.0, largest))
    with torch.no_grad():
        torch.testing.assert_close(loss_function(model, batch)[0], whole_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", sorted({**ISOLATED, **NOT_ISOLATED}))
def test_every_family_has_the_same_loss_and_gradients_in_chunks(family: str) -> None:
    model = build(family)
    loss_function = find_loss_function(model, sample_ids=SAMPLE)
    assert_same(model, loss_function, some_batch())


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}]
)
def test_tied_untied_and_half_precision_heads_agree(changes: dict[str, Any]) -> None:
    model = build("gemma2", **{name: value for name, value in changes.items() if name != "dtype"})
    batch = some_batch()
    if "dtype" not in changes:
        assert_same(model, find_loss_function(model, sample_ids=SAMPLE), batch)
        return
    loss_function = find_loss_function(model, sample_ids=SAMPLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(model, loss_function, batch)
        whole_loss, expected = gradients(model, replace(loss_function, head=None), batch)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-3, atol=0)
    for gradient, expected_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=0, atol=2e-2 * float(expected_gradient.abs().max().clamp(min=1e-3))
        )


def test_an_adapter_on_the_head_and_a_frozen_head_agree() -> None:
    adapted = models.llama()
    add_adapter(adapted, Lora(r=4, target_modules=["lm_head", "q_proj"]), base_model=None, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    loss_function = find_loss_function(adapted, sample_ids=SAMPLE)
    assert loss_function.head is not None
    assert any("lora_A" in name for name in loss_function.head.parameters)
    assert_same(adapted, loss_function, some_batch())
    frozen = models.llama()
    frozen.get_parameter("lm_head.weight").requires_grad_(False)
    assert_same(frozen, find_loss_function(frozen, sample_ids=SAMPLE), some_batch())


def test_the_log_probabilities_of_preference_pairs_agree() -> None:
    model, batch = models.llama(), some_batch()
    loss_function = preference_loss(find_loss_function(model, sample_ids=SAMPLE), "dpo", "llama", beta=0.1)
    found: list[list[torch.Tensor]] = []
    for function in (loss_function, replace(loss_function, head=None)):
        model.zero_grad()
        log_probabilities_B, _ = function.log_probabilities(model, batch)
        (log_probabilities_B * torch.tensor([0.3, -0.7, 2.0])).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append([log_probabilities_B.detach(), gradient])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_a_batch_of_few_logits_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = models.llama()
    loss_function = find_loss_function(model, sample_ids=SAMPLE)
    assert loss_function.head is not None
    assert not loss_function.uses_chunks(some_batch())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_several_processes_learn_the_same_in_chunks(tmp_path: Path) -> None:
    alone = results(tmp_path, 1, [case("alone", world=1, model="large vocabulary")])["alone"]
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    found = results(
        tmp_path, 2, [case(name, world=2, model="large vocabulary", **more) for name, more in strategies.items()]
    )
    for name, result in found.items():
        assert result["loss"] == pytest.approx(alone["loss"], abs=1e-5), name
        assert result["weight"] == pytest.approx(alone["weight"], rel=1e-5), name


MEASURES_ITS_PEAK = """
import resource
import numpy as np, torch
from tests.zeta_core.models import llama
from zeta_core.data.sequences import Batch
from zeta_core.objective.loss_probe import find_loss_function

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model = llama(vocab_size=131_072, hidden_size=16, max_position_embeddings=512)
loss_function = find_loss_function(model, sample_ids=[5, 6, 7, 8, 9, 10])
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
before = peak()
ids_BT = torch.randint(0, 131_072, (64, 512))
positions_BT = torch.arange(512).expand_as(ids_BT)
loss, _ = loss_function(model, Batch(ids_BT, ids_BT, positions_BT, None, ids_BT.numel()))
loss.backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_32768_tokens_with_131072_logits_each_need_less_than_2_gigabytes() -> None:
    """All logits in float32 would take 17 GB, and their gradient as much."""
    command = [sys.executable, "-c", MEASURES_ITS_PEAK]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=True).stdout
    assert int(out) < 2e9
