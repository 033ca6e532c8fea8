"""Freezing parameters by name pattern, so that full fine-tuning leaves them unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from zeta_core.failures import CannotTrain


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Turn off the gradient of every parameter whose name matches one of the shell patterns (``*`` crosses dots).

    Raises `CannotTrain` if a pattern matches no parameter, or if no parameter is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in named if fnmatchcase(name, pattern)]
        if not matching:
            some = ", ".join(list(named)[:6])
            raise CannotTrain(
                f"freeze has {pattern!r}, which matches no parameter; use shell patterns for names such as {some}.",
                param="freeze",
            )
        for name in matching:
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise CannotTrain(
            f"freeze is {list(patterns)!r}, which leaves no parameter to train; remove some of the patterns.",
            param="freeze",
        )
