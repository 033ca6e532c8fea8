"""The loss function of a model for packed documents."""

from __future__ import annotations

from torch import nn

from zeta_core.objective.isolation_probe import find_isolation
from zeta_core.objective.loss import LossFunction
from zeta_core.objective.loss_probe import find_loss_function


def packed_loss_function(model: nn.Module, sample_ids: list[int]) -> LossFunction:
    """The loss function of the model, which isolates packed documents if the model can."""
    isolation = find_isolation(model, sample_ids=sample_ids).isolation
    return find_loss_function(model, sample_ids=sample_ids, isolation=isolation)
