"""All conventions of a module give the same loss, and any split of a batch gives the same gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.zeta_core import models
from tests.zeta_core.data.token_files import random_documents
from tests.zeta_core.objective.packed_loss import packed_loss_function
from zeta_core.data.sequences import Sequences, micro_batches
from zeta_core.failures import InvalidModel
from zeta_core.objective.loss import Convention
from zeta_core.objective.loss_probe import find_loss_function

SAMPLE = [5, 6, 7, 8, 9, 10, 11, 12]


def _module(kind: type[models.PlainModel]) -> models.PlainModel:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize(
    ("kind", "convention"),
    [
        (models.PlainModel, Convention.LOGITS),
        (models.WithLabels, Convention.LABELS),
        (models.WithTargets, Convention.TARGETS),
        (models.WithReturnLoss, Convention.RETURN_LOSS),
    ],
)
def test_each_convention_gives_the_same_loss(kind: type[models.PlainModel], convention: Convention) -> None:
    batch = Sequences(random_documents([64]), 16, pack=True).batch(np.arange(4), 4)
    loss_function = find_loss_function(_module(kind), sample_ids=SAMPLE)
    assert loss_function.convention is convention
    found, _ = loss_function(_module(kind), batch)
    reference, _ = find_loss_function(_module(models.PlainModel), sample_ids=SAMPLE)(_module(models.PlainModel), batch)
    # Every sequence lies within a single document, so its tokens and its targets are the same.
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=0)


def test_a_loss_over_all_tokens_is_not_scaled_up_for_short_documents() -> None:
    batch = Sequences(random_documents([4] * 16), 16, pack=True).batch(np.arange(4), 4)
    assert batch.num_targets == 4 * 12 < batch.ids_BT[:, 1:].numel()
    model = _module(models.WithReturnLoss)
    found, _ = find_loss_function(model, sample_ids=SAMPLE)(model, batch)
    torch.testing.assert_close(found / batch.num_targets, model(batch.ids_BT, return_loss=True))


def test_a_hugging_face_model_returns_logits_without_a_cache() -> None:
    loss_function = find_loss_function(models.llama(), sample_ids=SAMPLE)
    assert loss_function.convention is Convention.LOGITS
    assert dict(loss_function.fixed) == {"use_cache": False}


def test_probing_restores_the_random_state() -> None:
    model = models.plain(dropout=0.5)
    before = torch.get_rng_state()
    packed_loss_function(model, SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


class _Particular(models.PlainModel):
    """Accepts ids only by keyword, requires a 2-D mask, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls: torch.Tensor
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

    def forward(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert attention_mask.dim() == 2
        self.num_calls += 1
        return super().forward(input_ids)


def test_a_forward_with_required_arguments_gets_them_and_is_not_changed() -> None:
    model = _module(_Particular)
    loss_function = packed_loss_function(model, SAMPLE)
    assert model.num_calls == 0
    batch = Sequences(random_documents([5, 40, 19]), 16, pack=True).batch(np.arange(4), 4)
    plainly = packed_loss_function(_module(models.PlainModel), SAMPLE)
    assert loss_function(model, batch)[0] == plainly(_module(models.PlainModel), batch)[0]


def test_too_few_logits_for_the_data_are_rejected_before_the_first_step() -> None:
    class Narrow(models.PlainModel):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids)[..., :100]

    with pytest.raises(InvalidModel, match="token id 229, but Narrow returns 100 logits"):
        find_loss_function(_module(Narrow), sample_ids=SAMPLE, largest_id=229)


class _Several(models.PlainModel):
    """Returns its hidden states, its logits, and both again with zeros appended."""

    places: tuple[int, ...] = ()

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = super().forward(ids)
        padded = torch.nn.functional.pad(logits, (0, 16))
        every = (self.embedding(ids), logits, padded, ids.float()[None].expand(3, *ids.shape))
        return tuple(every[place] for place in self.places)


@pytest.mark.parametrize(
    ("places", "at"), [((0, 1), 1), ((1, 0), 0), ((0, 2), 1), ((2, 1, 0), 1), ((3, 1), 1), ((1,), 0)]
)
def test_the_logits_among_several_results_have_an_entry_for_each_id(places: tuple[int, ...], at: int) -> None:
    torch.manual_seed(0)
    model = _Several()
    model.places = places
    loss_function = find_loss_function(model, sample_ids=SAMPLE, largest_id=300, vocab_size=models.VOCABULARY)
    assert loss_function.logits_at == at
    batch = Sequences(random_documents([64]), 16, pack=True).batch(np.arange(4), 4)
    plainly = find_loss_function(_module(models.PlainModel), sample_ids=SAMPLE)
    torch.testing.assert_close(
        loss_function(model, batch)[0], plainly(_module(models.PlainModel), batch)[0], rtol=1e-3, atol=0
    )


def test_ambiguous_results_are_rejected() -> None:
    model = _Several()
    model.places = (1, 1)
    with pytest.raises(InvalidModel, match=r"tokens, 384\) and \(batch, tokens, 384\), so it is unclear which"):
        find_loss_function(model, sample_ids=SAMPLE, vocab_size=models.VOCABULARY)


def test_the_error_for_an_unusable_module_describes_what_is_expected() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids * self.weight

    with pytest.raises(InvalidModel, match=r"Silent returns neither logits .* nor a loss"):
        find_loss_function(Silent(), sample_ids=SAMPLE)


def _gradient(
    build: Callable[[], nn.Module], window: list[int], sequences: Sequences, micro: int, world: int
) -> torch.Tensor:
    model = build()
    loss_function = packed_loss_function(model, SAMPLE)
    rows = np.array(window)
    num_targets = sequences.num_targets(rows)
    for rank in range(world):
        for indices, counting in micro_batches(rows, micro_batch=micro, world_size=world, rank=rank):
            total, _ = loss_function(model, sequences.batch(indices, counting, isolate=loss_function.isolates))
            (total / num_targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", [models.plain, models.llama, lambda: _module(models.WithLabels)])
@pytest.mark.parametrize(("micro", "world"), [(1, 1), (4, 1), (2, 3)])
def test_any_split_of_a_batch_gives_the_gradient_of_the_full_batch(
    kind: Callable[[], nn.Module], micro: int, world: int
) -> None:
    """Documents of very different lengths, with a partial last window."""
    sequences = Sequences(random_documents([3, 2, 2, 50, 4, 2, 2, 2, 30, 9]), 16, pack=True)
    window = list(range(len(sequences)))
    full = _gradient(kind, window, sequences, len(window), 1)
    split = _gradient(kind, window, sequences, micro, world)
    assert ((split - full).norm() / full.norm()).item() < 1e-6


def test_filler_rows_do_not_count_in_a_models_own_mean() -> None:
    """Seven sequences in batches of four on two ranks: in the last batch, one rank gets a filler row."""
    sequences = Sequences(random_documents([7 * 16]), 16, pack=True)
    assert len(sequences) == 7
    full = _gradient(lambda: _module(models.WithReturnLoss), list(range(7)), sequences, 7, 1)
    split = _gradient(lambda: _module(models.WithReturnLoss), list(range(7)), sequences, 2, 2)
    assert ((split - full).norm() / full.norm()).item() < 1e-6


@pytest.mark.parametrize("build", [models.llama, models.PlainModel])
def test_logits_are_only_computed_for_positions_with_targets(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    documents = random_documents([200] * 8)
    learned = np.arange(documents.num_tokens) % 200 >= 150  # the answers; the last position predicts nothing
    sequences = Sequences(replace(documents, supervised=learned), 200, pack=True)
    batch = sequences.batch(np.arange(4), 3)
    assert batch.num_targets == 3 * 50
    assert batch.logit_positions_K is not None
    assert len(batch.logit_positions_K) == 64  # 50, padded to a multiple
    assert set(range(149, 199)) <= set(batch.logit_positions_K.tolist())

    loss_function = packed_loss_function(model, SAMPLE)
    # A custom module computes the logits of all positions.
    assert loss_function.supports_logit_positions == (build is models.llama)
    num_logits: list[int] = []
    head = nn.Module.get_submodule(model, "lm_head" if build is models.llama else "head")
    head.register_forward_hook(lambda _m, _i, logits: num_logits.append(logits.shape[1]))
    losses, gradients = list[float](), list[torch.Tensor]()
    for way in (loss_function, replace(loss_function, supports_logit_positions=False)):
        model.zero_grad()
        loss, _ = way(model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert num_logits == [64 if loss_function.supports_logit_positions else 200, 200]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients)
