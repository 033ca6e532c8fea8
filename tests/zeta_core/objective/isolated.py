"""The loss of a model that keeps packed documents apart, if it can."""

from __future__ import annotations

from torch import nn

from zeta_core.objective.isolation_probe import find_isolation
from zeta_core.objective.loss import LossFunction, find_loss_function


def isolating_loss(model: nn.Module, sample_ids: list[int]) -> LossFunction:
    isolation = find_isolation(model, sample_ids=sample_ids).isolation
    return find_loss_function(model, sample_ids=sample_ids, isolation=isolation)
