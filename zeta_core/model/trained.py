"""What of a model is trained, and with that what a checkpoint of it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zeta_core.checkpoint import state as states
from zeta_core.checkpoint.state import Saved
from zeta_core.contract.spec import Lora
from zeta_core.model.export import Export
from zeta_core.model.facts import skeleton_of
from zeta_core.model.freezing import freeze
from zeta_core.model.lora import add_adapter
from zeta_core.model.sources import Located
from zeta_core.plan import Plan

_PRECISION_WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def choose_what_is_trained(
    model: nn.Module, located: Located, plan: Plan, tokenizer: Any, *, merge: bool
) -> tuple[Saved, Export]:
    """Put in the adapter, or freeze what is not trained; which weights a checkpoint holds, and how they are written.

    What is trained is in float32, whatever it is stored in. The base of an adapter keeps its own precision where the
    run computes in that, and is in float32 elsewhere.
    """
    dtype = located.dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    skeleton = skeleton_of(model, dtype)
    if plan.lora is None:
        model.float()
        freeze(model, plan.freeze)
        weights, aliases = states.unique_weights(model.state_dict())
        return Saved(frozenset(weights), aliases), Export(skeleton, tokenizer, dtype, located.base_model)
    model.to(dtype if plan.mixed_precision == _PRECISION_WORDS.get(dtype) else torch.float32)
    adapter = add_adapter(model, Lora(**plan.lora), base_model=located.base_model, seed=plan.seed)
    weights, aliases = states.unique_weights(model.state_dict())
    saved = Saved(adapter.names, aliases, whole=frozenset(weights) if merge else None)
    return saved, Export(skeleton, tokenizer, dtype, located.base_model, adapter)
