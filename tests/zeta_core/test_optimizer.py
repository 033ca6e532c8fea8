"""Weight decay where it belongs, and every parameter trained."""

from __future__ import annotations

import torch

from tests.zeta_core.models import llama, plain
from zeta_core.optimizer import build_optimizer, parameter_groups


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    model = plain()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = parameter_groups(model.named_parameters(), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "embedding.weight",
        *(f"blocks.{block}.{part}.weight" for block in (0, 1) for part in ("up", "down")),
    }
    assert all(p.dim() == 1 for p in kept["params"])


def test_every_parameter_is_in_the_optimizer_once() -> None:
    for model in (plain(), llama(), llama(tie_word_embeddings=True)):
        optimizer = build_optimizer("adamw", model, learning_rate=1e-3, weight_decay=0.1)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted({id(p) for p in model.parameters()})


def test_a_frozen_parameter_is_left_alone() -> None:
    model = plain()
    model.embedding.weight.requires_grad_(False)
    optimizer = build_optimizer("sgd", model, learning_rate=1e-3, weight_decay=0.1)
    held: list[torch.Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is not model.embedding.weight for p in held)
