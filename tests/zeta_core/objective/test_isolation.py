"""Isolation of packed documents: each has the same loss and gradient as alone, or documents are not packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.zeta_core.advice_runs import train, warnings_by_code
from tests.zeta_core.data.token_files import random_documents
from tests.zeta_core.models import VOCABULARY, PlainModel
from tests.zeta_core.objective.packed_loss import packed_loss_function
from tests.zeta_core.objective.small_families import ISOLATED, NOT_ISOLATED, WINDOW, build, config_of
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.data.sequences import Sequences
from zeta_core.objective.isolation import Isolation
from zeta_core.objective.isolation_probe import find_isolation
from zeta_core.objective.loss import LossFunction

SAMPLE = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
DOCUMENTS = random_documents([3 * WINDOW, 5, 1, 2, 2 * WINDOW, 3])
LENGTH = DOCUMENTS.num_tokens


def loss_and_gradient(model: nn.Module, loss_function: LossFunction, *, pack: bool) -> tuple[float, torch.Tensor]:
    """The mean loss per target of `DOCUMENTS`, in one sequence or in one each, and its gradient."""
    sequences = Sequences(DOCUMENTS, LENGTH, pack=pack)
    batch = sequences.batch(np.arange(len(sequences)), len(sequences), isolate=pack)
    model.zero_grad()
    total, _ = loss_function(model, batch)
    loss = total / batch.num_targets
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference_when_packed(model: nn.Module) -> tuple[float, float]:
    """How much packing changes the loss, and the gradient relative to its norm."""
    loss_function = packed_loss_function(model, SAMPLE)
    assert loss_function.isolates
    packed, packed_gradient = loss_and_gradient(model, loss_function, pack=True)
    alone, gradient = loss_and_gradient(model, loss_function, pack=False)
    return abs(packed - alone), ((packed_gradient - gradient).norm() / gradient.norm()).item()


@pytest.mark.parametrize("family", ISOLATED)
def test_packed_documents_have_the_same_loss_and_gradient_as_alone(family: str) -> None:
    loss, gradient = difference_when_packed(build(family))
    assert loss < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("family", NOT_ISOLATED)
def test_a_family_that_leaks_between_documents_is_found(family: str) -> None:
    finding = find_isolation(build(family), sample_ids=SAMPLE)
    assert finding.isolates is False
    assert "can't keep packed documents apart" in (finding.problem or "")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "llama4_text", "gpt_oss", "opt", "lfm2", "bamba"])
def test_a_model_without_storage_has_the_same_finding_as_with_it(family: str) -> None:
    assert find_isolation(build(family, "meta"), sample_ids=SAMPLE) == find_isolation(build(family), sample_ids=SAMPLE)


def test_windows_too_long_to_probe_keep_their_effect() -> None:
    """The probe represents the model by a small one with short windows; the result has the model's own windows."""
    model = build("gpt_oss", sliding_window=300, max_position_embeddings=2048)
    loss_function = packed_loss_function(model, SAMPLE)
    documents = random_documents([400, 5])
    sequences = Sequences(documents, 405, pack=True)
    with torch.no_grad():
        packed = loss_function.logits_in(loss_function.call(model, sequences.batch(np.array([0]), 1)))
        alone = loss_function.logits_in(
            model(torch.from_numpy(documents.ids[None, :400].astype(np.int64)), use_cache=False)
        )
    assert packed is not None
    assert alone is not None
    torch.testing.assert_close(packed[:, :400], alone, atol=2e-6, rtol=1e-5)


class Attending(PlainModel):
    """One layer of attention with a window. A given mask is combined with the window or replaces it."""

    def __init__(self, *, window: int = VOCABULARY, keeps_window: bool = True, starts_at_zero: bool = False) -> None:
        super().__init__()
        self.window, self.keeps_window = window, keeps_window
        self.values = nn.Linear(16, 16)
        if starts_at_zero:
            nn.init.zeros_(self.values.weight)
            nn.init.zeros_(self.values.bias)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.embedding(ids)
        at = torch.arange(ids.shape[1])
        ago = at[:, None] - at[None, :]
        allowed = (ago >= 0) & (ago < self.window)
        if attention_mask is not None:
            allowed = attention_mask[:, 0] & allowed if self.keeps_window else attention_mask[:, 0]
        scores = (x @ x.transpose(1, 2)).masked_fill(~allowed, -torch.inf)
        return self.head(x + scores.softmax(-1) @ self.values(x))


def attending(**options: Any) -> Attending:
    torch.manual_seed(0)
    return Attending(**options)


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"starts_at_zero": True}])
def test_a_module_with_its_own_attention_is_isolated_by_a_mask(options: dict[str, Any]) -> None:
    model = attending(**options)
    assert find_isolation(model, sample_ids=SAMPLE).isolation == Isolation(mask="boolean")
    loss, gradient = difference_when_packed(model)
    assert loss < 1e-5
    assert gradient < 1e-4


def test_a_mask_that_replaces_the_window_of_a_module_is_not_used() -> None:
    finding = find_isolation(attending(window=4, keeps_window=False), sample_ids=SAMPLE)
    assert finding.problem == (
        "can't keep packed documents apart: every mask that separates documents also changes its output within a "
        "document"
    )


def test_a_leak_behind_a_projection_that_starts_at_zero_is_found() -> None:
    class Leaking(Attending):
        def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(ids)

    torch.manual_seed(0)
    assert find_isolation(Leaking(starts_at_zero=True), sample_ids=SAMPLE).isolates is False


def test_a_module_that_cannot_be_copied_is_probed_without_changing_it() -> None:
    class Uncopied(Attending):
        def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
            raise TypeError("it holds a lock")

    torch.manual_seed(0)
    model = Uncopied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert find_isolation(model, sample_ids=SAMPLE).isolation == Isolation(mask="boolean")
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


SPEC: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "seq_len": 64, "learning_rate": 1e-9}


def _data(directory: Path) -> dict[str, Any]:
    texts = [f"Document {number} of 31 bytes: {'abcdef'[number] * 6}." for number in range(6)]
    assert {len(text) for text in texts} == {31}, "with an end token, two fill a sequence"
    file = directory / "documents.jsonl"
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return {"dataset": {"path": str(file)}, "eval_dataset": {"path": str(file)}}


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3"])
def test_a_run_has_the_same_loss_packed_and_unpacked(family: str, tmp_path: Path) -> None:
    model, spec = ConfigModel(config=config_of(family)), {**SPEC, **_data(tmp_path)}
    packed, lines = train(tmp_path, model, spec)
    assert lines.resolved_spec["pack"] is True
    assert not {"documents_not_packed", "documents_not_isolated"} & warnings_by_code(lines).keys()
    alone, _ = train(tmp_path, model, {**spec, "pack": False})
    assert packed.progress.eval_loss == pytest.approx(alone.progress.eval_loss, abs=1e-5)


@pytest.mark.extended
def test_a_hybrid_model_is_not_packed_unless_the_user_insists(tmp_path: Path) -> None:
    model, spec = ConfigModel(config=config_of("lfm2")), {**SPEC, **_data(tmp_path)}
    default, lines = train(tmp_path, model, spec)
    assert lines.resolved_spec["pack"] is False
    message = warnings_by_code(lines)["documents_not_packed"].message
    assert message.startswith("Lfm2ForCausalLM can't keep packed documents apart: none of the attention masks")
    alone, lines = train(tmp_path, model, {**spec, "pack": False})
    assert default.progress.eval_loss == alone.progress.eval_loss
    assert "documents_not_packed" not in warnings_by_code(lines)
    _, lines = train(tmp_path, model, {**spec, "pack": True})
    assert lines.resolved_spec["pack"] is True
    assert "documents influence each other" in warnings_by_code(lines)["documents_not_isolated"].message
