"""Detecting models whose control flow depends on the data: skipped blocks, experts without a token, branches.

Two ranks then use different parameters in the same step. If parameters or gradients are exchanged during the forward
and backward passes, each rank would wait for a different collective. The engines exchange them in a fixed order instead
if `has_data_dependent_path` is true. A parameter that only some ranks used has a zero gradient on the others.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Modules of these packages call every block in every forward. Experts of transformers are slices of one parameter.
_KNOWN_PACKAGES = frozenset({"torch", "transformers", "peft", "bitsandbytes", "zeta_core"})


def has_data_dependent_path(model: nn.Module) -> bool:
    """Whether ranks may call different blocks: the model has unknown code, or its config drops whole layers."""
    return any(type(part).__module__.partition(".")[0] not in _KNOWN_PACKAGES for part in model.modules()) or any(
        name.endswith("layerdrop") and value for config in _configs(model) for name, value in vars(config).items()
    )


def may_skip_parameters(model: nn.Module) -> bool:
    """Whether a forward may use only a part of the parameters, such as the text part of an image and text model."""
    return has_data_dependent_path(model) or any(getattr(config, "sub_configs", None) for config in _configs(model))


def _configs(model: nn.Module) -> list[Any]:
    found = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "__dict__")]
