"""Choosing the next token of a sequence from its logits, as OpenAI's parameters describe it.

The order is: penalties, temperature, top_p, drawing. A sequence draws from a random generator of its own, so the same
seed gives the same text whatever other sequences are decoded with it, except where rounding decides.

Shapes: V entries of the vocabulary.
"""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass

import torch

from zeta_core.contract.wire.answers import AnswerOptions


class NotFinite(Exception):
    """The model computed logits that are not finite."""


@dataclass(frozen=True)
class Chosen:
    """A token with the log-probability that the model gave it, and the most probable tokens with theirs.

    Log-probabilities are those of the model, before penalties, temperature and top_p.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenSampler:
    """Chooses the tokens of one choice of an answer."""

    def __init__(self, options: AnswerOptions, choice: int) -> None:
        self._options = options
        self._counts: Counter[int] = Counter()
        seed = secrets.randbits(63) if options.seed is None else options.seed + choice
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    def choose(self, logits_V: torch.Tensor) -> Chosen:
        """Choose a token. Raises `NotFinite`."""
        logits_V = logits_V.float().cpu()
        token = self._token(logits_V)
        self._counts[token] += 1
        if not self._options.logprobs:
            return Chosen(token)
        logprobs_V = torch.log_softmax(logits_V, dim=-1)
        top = torch.topk(logprobs_V, min(self._options.top_logprobs, len(logprobs_V)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Chosen(token, float(logprobs_V[token]), tuple(pairs))

    def _token(self, logits_V: torch.Tensor) -> int:
        options = self._options
        if self._counts and (options.presence_penalty or options.frequency_penalty):
            logits_V = logits_V.clone()
            for token, count in self._counts.items():
                logits_V[token] -= options.presence_penalty + options.frequency_penalty * count
        if options.temperature == 0.0 or options.top_p == 0.0:
            token = int(logits_V.argmax())
            if not torch.isfinite(logits_V[token]):
                raise NotFinite
            return token
        weights_V = torch.softmax(logits_V / options.temperature, dim=-1)
        if not torch.isfinite(weights_V).all():
            raise NotFinite
        if options.top_p < 1.0:
            weights_V = _nucleus(weights_V, options.top_p)
        # The inverse of the cumulative distribution: one random number per token, whatever the logits are.
        cumulative_V = weights_V.double().cumsum(dim=-1)
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64) * cumulative_V[-1]
        index = int(torch.searchsorted(cumulative_V, drawn, right=True))
        return min(index, int(weights_V.nonzero()[-1]))


def _nucleus(weights_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The weights of the smallest set of tokens with a probability of ``top_p`` (Holtzman et al. 2019); others are 0.

    Source: arXiv 1904.09751.
    """
    sorted_V, order_V = torch.sort(weights_V, descending=True)
    is_outside_V = sorted_V.cumsum(dim=-1) - sorted_V >= top_p
    kept_V = torch.where(is_outside_V, 0.0, sorted_V)
    return torch.zeros_like(weights_V).scatter(0, order_V, kept_V)
