"""What is worth saying about a run before its first step: its learning rate, its precision, its padding.

Nothing here changes the run. What cannot be trained is refused where it is met (`memory.needs`, `model`,
`data.packing`), what goes wrong later is told by `train.divergence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeta_core.contract.advice import Advice, Patch
from zeta_core.contract.sources import ConfigModel
from zeta_core.contract.spec import TrainerOptions
from zeta_core.data.packing import Sequences
from zeta_core.model.facts import embedding_rows, num_positions
from zeta_core.model.quantized import num_weights
from zeta_core.model.sources import Located
from zeta_core.objective.loss import Convention, LossOf
from zeta_core.optim.rates import Trained, UsualRates, unusual_rate, usual_rates
from zeta_core.plan import Facts, Plan
from zeta_core.train.divergence import Watch


@dataclass(frozen=True)
class Setup:
    """A run that is about to begin."""

    options: TrainerOptions
    plan: Plan
    facts: Facts
    located: Located
    model: nn.Module
    loss_of: LossOf
    num_documents: int

    @property
    def trained(self) -> Trained:
        if self.options.method == "dpo":
            return "DPO"
        if self.plan.lora is not None:
            return "training a LoRA adapter"
        return "fine-tuning all weights" if self.located.pretrained else "training from scratch"

    @property
    def num_parameters(self) -> int:
        return sum(num_weights(parameter) for parameter in self.model.parameters())

    @property
    def usual_rates(self) -> UsualRates:
        return usual_rates(self.plan.optimizer, self.trained, self.num_parameters)

    def watch(self, say: Callable[[Advice], None]) -> Watch:
        """What looks at the loss of every step."""
        known = embedding_rows(self.model)
        return Watch(self.plan, say, vocabulary=known, usual=self.usual_rates, supports_bf16=self.facts.supports_bf16)

    def advice(self) -> Iterator[Advice]:
        """What is unusual, each with the patch that makes it usual."""
        rate = unusual_rate(self.plan.learning_rate, self.plan.optimizer, self.trained, self.num_parameters)
        if rate is not None:
            yield rate
        yield from self._precision()
        yield from self._positions()
        yield from self._sharing()

    def _sharing(self) -> Iterator[Advice]:
        """Tokens, documents and sequences that see what they should not."""
        model = type(self.model).__name__
        computes_loss = self.loss_of.convention is Convention.RETURN_LOSS
        if self.loss_of.looks_ahead:
            yield Advice(
                code="looks_ahead",
                message=f"What {model} says of a token depends on the tokens after it, so it sees what it is to "
                "predict: its loss falls fast, and it learns nothing that generates text.",
                hint="Give it a causal mask, or take a causal model (for BERT's kind, is_decoder in its config).",
            )
        if self.plan.pack and not self.loss_of.isolates and self.num_documents > 1:
            yield Advice(
                code="documents_not_isolated",
                message=f"{model}'s forward takes no attention mask or positions that keep documents apart, so those "
                "that share a sequence see one another.",
                hint="Let its forward return logits and take a mask or positions; without pack it would learn padding."
                if computes_loss
                else "pack=False gives each document sequences of its own.",
                patch=None if computes_loss else {"pack": False},
            )
        if not self.plan.pack and computes_loss:
            yield Advice(
                code="padding_is_learned",
                message=f"{model} computes the loss of whole sequences, so it learns what fills the end of the shorter "
                "ones of a batch, too.",
                hint="Use pack, or let its forward return logits.",
                patch={"pack": True},
            )

    def _precision(self) -> Iterator[Advice]:
        asked, stored = self.plan.mixed_precision, self.located.dtype
        if asked == "no":
            return
        better = "bf16" if self.facts.supports_bf16 else "no"
        if asked == "fp16" and stored is torch.bfloat16:
            yield Advice(
                code="narrow_precision",
                message="mixed_precision is 'fp16', and the model is stored in bfloat16: what it computes may go "
                "beyond 65,504, where fp16 ends, though its weights are kept in float32 here.",
                hint=f"Use {better!r}.",
                patch={"mixed_precision": better},
                evidence={"stored": "bfloat16"},
            )
        elif self.facts.device == "cpu":
            yield Advice(
                code="slow_precision",
                message=f"mixed_precision is {asked!r}, and a CPU without instructions for it is several times slower "
                "with it than with 'no'.",
                hint="Use 'no', unless this CPU has them (avx512_bf16, amx, or ARM's bf16).",
                patch={"mixed_precision": "no"},
            )
        elif asked == "bf16" and not self.facts.supports_bf16:
            other = "fp16" if self.plan.strategy == "replicated" else "no"
            yield Advice(
                code="emulated_precision",
                message="mixed_precision is 'bf16', which this GPU has no instructions for: it is emulated, and slow.",
                hint=f"Use {other!r}.",
                patch={"mixed_precision": other},
            )

    def _positions(self) -> Iterator[Advice]:
        limit = num_positions(self.model)
        if limit is not None and self.plan.seq_len > limit and self.located.pretrained:
            yield Advice(
                code="beyond_positions",
                message=f"seq_len is {self.plan.seq_len}, and the model was trained with up to {limit} positions; what "
                "it does beyond them it has to learn first.",
                hint=f"Use at most {limit}, unless longer sequences are what it is to learn.",
                patch={"seq_len": limit},
            )


def vocabulary_patch(options: TrainerOptions, model: object, located: Located, num_tokens: int) -> Patch | None:
    """What makes tokenizer and model agree: more rows of a model from scratch, or a trained one's own tokenizer."""
    if isinstance(model, ConfigModel):
        return {"model": {"config": {"vocab_size": num_tokens}}}
    if options.tokenizer is not None and located.has_tokenizer:
        return {"tokenizer": None}
    return None


def padding_advice(tokenizer: Any, sequences: Sequences, loss_of: LossOf, plan: Plan) -> Advice | None:
    """How sequences of unequal length share a batch, where the tokenizer has no token for that.

    The rest of a shorter one holds ids of real tokens, behind its last own one: causal attention does not look there,
    and no position of it has a target. So neither a new token nor more rows of the embedding are needed, and the end of
    a document is learned, which it is not where people use its token as padding. Without ``pack`` there is a patch.
    """
    masks = loss_of.convention is not Convention.RETURN_LOSS
    if not masks or not sequences.pads or getattr(tokenizer, "pad_token", "") is not None:
        return None
    fills = not plan.pack and plan.beta is None
    return Advice(
        code="tokenizer_without_padding",
        message="The tokenizer has no padding token, and none is needed: what fills the end of a shorter sequence is "
        "seen by no other token and left out of the loss. Tokenizer and embedding stay as they are.",
        hint="With pack little is left to fill: several documents share a sequence, and do not see one another."
        if fills
        else None,
        patch={"pack": True} if fills else None,
        evidence={"pad_token": None, "pack": plan.pack, "mean_tokens": round(sequences.mean_length, 1)},
    )
