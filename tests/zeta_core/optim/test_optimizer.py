"""Which optimizer trains a parameter, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.zeta_core.models import llama, plain
from zeta_core.contract.spec.options import Optimizer
from zeta_core.failures import CannotTrain
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.optim import adamw
from zeta_core.optim.adamw import CompactAdamW
from zeta_core.optim.muon import Muon
from zeta_core.optim.optimizer import ADAM_BETAS, ParameterGroups, build_optimizer
from zeta_core.optim.orthogonal import orthogonalized


def optimizer_of(name: Optimizer, model: nn.Module, blocks: list[nn.Module]) -> torch.optim.Optimizer:
    groups = ParameterGroups.of(model, blocks, name)
    return build_optimizer(name, model, groups, learning_rate=1e-3, weight_decay=0.1)


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    model = plain()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, not_decayed = ParameterGroups.of(model, repeated_blocks(model), "adamw").for_torch(0.1)
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "embedding.weight",
        *(f"blocks.{block}.{part}.weight" for block in (0, 1) for part in ("up", "down")),
    }
    assert all(p.dim() == 1 for p in not_decayed["params"])


def test_every_parameter_is_in_the_optimizer_once() -> None:
    for model in (plain(), llama(), llama(tie_word_embeddings=True)):
        optimizer = optimizer_of("adamw", model, [model])
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted({id(p) for p in model.parameters()})


def test_a_frozen_parameter_is_not_in_the_optimizer() -> None:
    model = plain()
    model.embedding.weight.requires_grad_(False)
    optimizer = optimizer_of("sgd", model, [model])
    held: list[torch.Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is not model.embedding.weight for p in held)


def test_adamw_uses_the_fused_kernel() -> None:
    model = plain()
    optimizer = optimizer_of("adamw", model, [model])
    assert all(group["fused"] for group in optimizer.param_groups)


def test_bf16_moments_update_like_float32_ones_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2))
    rounded = CompactAdamW([ours], lr=1e-2, betas=ADAM_BETAS, states="bf16", weight_decay=0.1)
    exact = torch.optim.AdamW([theirs], lr=1e-2, betas=ADAM_BETAS, weight_decay=0.1)
    for step in range(1, 31):
        monkeypatch.setattr(adamw, "CHUNK_VALUES", 64 * step)
        ours.grad = torch.randn(1000)
        theirs.grad = ours.grad.clone()
        rounded.step()
        exact.step()
        moved = 1e-2 * step  # at most
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if step == 1 else 0.02 * moved)


# --- Muon -------------------------------------------------------------------------------------------------------------


def test_muon_trains_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    model = llama()
    held = {id(parameter) for parameter in ParameterGroups.of(model, repeated_blocks(model), "muon").orthogonalized}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in held}
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == {"0", "1"}
    assert len(names) == 2 * 7, "four of the attention and three of the feed-forward part, in each of two blocks"
    optimizer = optimizer_of("muon", model, repeated_blocks(model))
    rest = [id(p) for group in optimizer.param_groups[1:] for p in group["params"]]
    assert sorted([*held, *rest]) == sorted(id(parameter) for parameter in model.parameters())


def test_muon_excludes_embedding_and_head_of_a_module_without_blocks() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 50))
    found = ParameterGroups.of(model, repeated_blocks(model), "muon").orthogonalized
    assert [tuple(parameter.shape) for parameter in found] == [(16, 8), (8, 16)]
    flat = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    with pytest.raises(CannotTrain, match="no matrix in its blocks"):
        optimizer_of("muon", flat, [flat])


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_orthogonalizing_keeps_directions_with_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalized(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ found @ v.T
    values = inside.diagonal()
    assert 0.6 < values.min() < values.max() < 1.3
    assert (inside - torch.diag(values)).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_an_update_of_muon_equals_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(24, 64)), nn.Parameter(torch.empty(24, 64))
    theirs.data.copy_(ours.data)
    before = ours.detach().clone()
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon([ours], None, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        ours.grad = torch.randn(24, 64)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    moved = (theirs - before).norm()
    assert ((ours - theirs).norm() / moved).item() < 2e-2, "torch computes the direction in bfloat16"
