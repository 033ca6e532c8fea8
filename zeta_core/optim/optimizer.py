"""The optimizer of a run, and its parameter groups: with and without weight decay, and those of Muon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zeta_core.contract.spec.options import Bf16Weights, Optimizer, OptimizerStates
from zeta_core.failures import CannotTrain, InvalidModel
from zeta_core.optim.adamw import CompactAdamW
from zeta_core.optim.lion import Lion
from zeta_core.optim.muon import Muon
from zeta_core.optim.roles import parameter_roles

# The usual values for language models (Brown et al. 2020, arXiv 2005.14165, appendix B).
ADAM_BETAS = (0.9, 0.95)
SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class ParameterGroups:
    """The trainable parameters by their treatment; a tied parameter is in exactly one group, once."""

    orthogonalized: list[nn.Parameter]  # by Muon; empty with any other optimizer
    decayed: list[nn.Parameter]
    not_decayed: list[nn.Parameter]

    @staticmethod
    def of(model: nn.Module, blocks: Sequence[nn.Module], optimizer: Optimizer) -> ParameterGroups:
        """Raises `InvalidModel` if no parameter is trainable, `CannotTrain` if Muon has no matrix."""
        roles = parameter_roles(model, blocks)
        groups = ParameterGroups([], [], [])
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            role = roles[name]
            if optimizer == "muon" and role.is_orthogonalized:
                groups.orthogonalized.append(parameter)
            else:
                (groups.decayed if role.decays else groups.not_decayed).append(parameter)
        if not (groups.orthogonalized or groups.decayed or groups.not_decayed):
            raise InvalidModel("The model has no trainable parameter; set requires_grad for at least one.")
        if optimizer == "muon" and not groups.orthogonalized:
            raise CannotTrain("optimizer is 'muon', but the model has no matrix in its blocks to train; use 'adamw'.")
        return groups

    def for_torch(self, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters that are not orthogonalized, as groups of a torch optimizer."""
        groups = [
            {"params": self.decayed, "weight_decay": weight_decay},
            {"params": self.not_decayed, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def describe(
        self,
        optimizer: Optimizer,
        weight_decay: float,
        states: OptimizerStates = "float32",
        bf16_weights: Bf16Weights | None = None,
    ) -> str:
        """One sentence with the number of tensors and of parameters in each group."""
        decays = f"with weight decay {weight_decay:g}"
        parts = [
            (self.orthogonalized, f"matrices by Muon {decays}"),
            (self.decayed, f"matrices and embeddings {decays}"),
            (self.not_decayed, "norms, biases and other parameters without weight decay"),
        ]
        counts = [f"{len(of)} {what} ({sum(p.numel() for p in of):,} parameters)" for of, what in parts if of]
        kept = [] if states == "float32" else [f"{states} states"]
        if bf16_weights is not None:
            how = {"stochastic": "stochastic rounding", "kahan": "Kahan summation"}[bf16_weights]
            kept.append(f"bf16 weights updated with {how}")
        name = f"{optimizer} with {' and '.join(kept)}" if kept else optimizer
        return f"Optimizer {name}: {'; '.join(counts)}."


def build_optimizer(
    name: Optimizer,
    model: nn.Module,
    parameters: ParameterGroups,
    *,
    learning_rate: float,
    weight_decay: float,
    states: OptimizerStates = "float32",
    bf16_weights: Bf16Weights | None = None,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The named optimizer over the model's trainable ``parameters``.

    Only AdamW keeps other ``states``, and updates weights in bfloat16. ``seed`` determines how values are rounded.
    """
    groups = parameters.for_torch(weight_decay)
    match name:
        case "muon":
            others = _adamw(groups, model, learning_rate) if groups else None
            return Muon(parameters.orthogonalized, others, lr=learning_rate, weight_decay=weight_decay)
        case "adamw" if states != "float32" or bf16_weights is not None:
            return CompactAdamW(
                groups, lr=learning_rate, betas=ADAM_BETAS, states=states, bf16_weights=bf16_weights, seed=seed
            )
        case "adamw":
            return _adamw(groups, model, learning_rate)
        case "sgd":
            whole = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
            fused = whole and _can_fuse(model)  # torch has no such kernel for shards
            return torch.optim.SGD(groups, lr=learning_rate, momentum=SGD_MOMENTUM, fused=fused)
        case "lion":
            return Lion(groups, lr=learning_rate)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=learning_rate)


def _adamw(groups: list[dict[str, Any]], model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=learning_rate, betas=ADAM_BETAS, fused=_can_fuse(model))


def _can_fuse(model: nn.Module) -> bool:
    """One kernel for the whole update: 3.3 times the speed of the loop on a CPU, and more on a GPU."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in model.parameters())
