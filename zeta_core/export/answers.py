"""The answers of an export, for the tokens of the checkpoint's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from zeta_core.export.prompts import encoded
from zeta_core.export.reference import Reference, answer_logprobs, end_tokens


class ExportAnswers(BaseModel):
    """The predictions of an export for the tokens of the reference, and properties of its tokenizer.

    ``agreeing`` and ``kl_divergences`` have one entry for each token of the reference's answers. The divergences of
    the base model are measured in the same way, so that an export without its adapter has the same ones.
    """

    model_config = ConfigDict(frozen=True)

    agreeing: list[bool]
    kl_divergences: list[float]
    base_kl_divergences: list[float] | None  # if the checkpoint is an adapter
    template: str | None
    same_prompt_tokens: bool
    stops: bool | None
    has_end_token: bool


def compare_logprobs(reference: Reference, logprobs: Sequence[torch.Tensor]) -> tuple[list[bool], list[float]]:
    """For each token: whether both models prefer the same one, and the KL divergence."""
    agreeing: list[bool] = []
    divergences: list[float] = []
    for ours_TV, theirs_TV in zip(reference.logprobs, logprobs, strict=True):
        width = min(ours_TV.shape[1], theirs_TV.shape[1])  # an export may have padded embeddings
        ours, theirs = ours_TV[:, :width], theirs_TV[:, :width]
        agreeing += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
        divergences += (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0).tolist()
    return agreeing, divergences


def answers_of(model: nn.Module, tokenizer: Any, reference: Reference) -> ExportAnswers:
    """The answers of an exported model that is loaded in this process."""
    agreeing, divergences = compare_logprobs(reference, answer_logprobs(model, reference.answers))
    base = None if reference.base_logprobs is None else compare_logprobs(reference, reference.base_logprobs)[1]
    ends = end_tokens(model, tokenizer)
    return ExportAnswers(
        agreeing=agreeing,
        kl_divergences=divergences,
        base_kl_divergences=base,
        template=tokenizer.chat_template or None,
        same_prompt_tokens=encoded(tokenizer, reference.prompts.texts) == reference.prompts.text_ids,
        stops=reference.ends <= ends if any(answer.has_ended for answer in reference.answers) else None,
        has_end_token=reference.ends <= ends,
    )
