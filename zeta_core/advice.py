"""Advice about a run before its first step: unusual learning rates, precision, padding and sequence lengths.

Advice never changes the run. The modules `memory.limits`, `model` and `data.sequences` reject runs that cannot be
trained; `train.divergence` diagnoses problems during training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zeta_core.contract.job.advice import Advice, Patch
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.data.sequences import Sequences
from zeta_core.model.inspection import embedding_rows, num_positions
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.quantization import num_weights
from zeta_core.objective.isolation_probe import IsolationFinding
from zeta_core.objective.loss import Convention, LossFunction
from zeta_core.optim.rates import TrainingKind, UsualRates, unusual_rate, usual_rates
from zeta_core.plan import Plan, PlanInputs
from zeta_core.train.divergence import DivergenceMonitor

FEW_STEPS = 20  # with fewer optimizer steps, a run is over before the learning rate has warmed up and decayed


@dataclass(frozen=True)
class RunAdvisor:
    """Gives advice about a run that is about to start."""

    options: TrainerOptions
    plan: Plan
    plan_inputs: PlanInputs
    located: LocatedModel
    model: nn.Module
    loss_function: LossFunction
    isolation: IsolationFinding
    num_documents: int

    @property
    def training_kind(self) -> TrainingKind:
        if self.options.method != "sft":
            return "learning preferences"
        if self.plan.lora is not None or self.plan_inputs.has_adapter:
            return "training a LoRA adapter"
        return "fine-tuning all weights" if self.located.pretrained else "training from scratch"

    @property
    def num_parameters(self) -> int:
        return sum(num_weights(parameter) for parameter in self.model.parameters())

    @property
    def usual_rates(self) -> UsualRates:
        return usual_rates(self.plan.optimizer, self.training_kind, self.num_parameters)

    def divergence_monitor(self, advise: Callable[[Advice], None]) -> DivergenceMonitor:
        """The monitor that examines the loss of every step."""
        known = embedding_rows(self.model)
        return DivergenceMonitor(
            self.plan, advise, vocab_size=known, usual=self.usual_rates, supports_bf16=self.plan_inputs.supports_bf16
        )

    def advice(self) -> Iterator[Advice]:
        """Advice about unusual settings, with the patch that corrects them."""
        rate = unusual_rate(self.plan.learning_rate, self.plan.optimizer, self.training_kind, self.num_parameters)
        if rate is not None:
            yield rate
        yield from self._length()
        yield from self._precision()
        yield from self._positions()
        yield from self._sharing()

    def _sharing(self) -> Iterator[Advice]:
        """Advice about information that leaks between tokens, documents and sequences."""
        model = type(self.model).__name__
        computes_loss = self.loss_function.convention is Convention.RETURN_LOSS
        if self.loss_function.looks_ahead:
            yield Advice(
                code="looks_ahead",
                message=f"{model}'s output for a token depends on later tokens, so the model sees what it should "
                "predict: its loss falls fast, but it does not learn to generate text.",
                hint="Use a causal mask, or a causal model (for BERT-like models, set is_decoder in the config).",
            )
        problem = self.isolation.problem or "doesn't keep packed documents apart"
        if self.plan.pack and not self.loss_function.isolates and self.num_documents > 1:
            yield Advice(
                code="documents_not_isolated",
                message=f"{model} {problem}. It is trained on sequences whose documents influence each other.",
                hint="Change its forward to return logits and accept a mask or positions; without pack, the model "
                "would be trained on padding."
                if computes_loss
                else "With pack=False, each sequence contains only one document.",
                patch=None if computes_loss else {"pack": False},
            )
        if not self.plan.pack and self.isolation.isolates is False and self.options.pack is None:
            yield Advice(
                code="documents_not_packed",
                message=f"{model} {problem}. Each sequence therefore contains one document, and is padded.",
                hint="With pack=True, documents share sequences and influence each other.",
            )
        if not self.plan.pack and computes_loss:
            yield Advice(
                code="padding_is_learned",
                message=f"{model} computes the loss over whole sequences, so it is also trained on the padding of "
                "shorter sequences in a batch.",
                hint="Use pack, or change its forward to return logits.",
                patch={"pack": True},
            )

    def _length(self) -> Iterator[Advice]:
        plan = self.plan
        if plan.epochs is None or plan.total_steps >= FEW_STEPS:
            return
        epochs = math.ceil(plan.epochs * FEW_STEPS / plan.total_steps)
        yield Advice(
            code="few_steps",
            message=f"This run has only {plan.total_steps} optimizer step{'' if plan.total_steps == 1 else 's'} "
            f"(epochs={plan.epochs:g}, global batch {plan.global_batch}), in which a model learns little.",
            hint=f"Use more data, a smaller batch, or more epochs; {epochs} epochs have about {FEW_STEPS} steps.",
            patch={"epochs": epochs},
            evidence={"steps": plan.total_steps, "global_batch_size": plan.global_batch},
        )

    def _precision(self) -> Iterator[Advice]:
        precision, stored = self.plan.mixed_precision, self.located.dtype
        if precision == "no":
            return
        better = "bf16" if self.plan_inputs.supports_bf16 else "no"
        if precision == "fp16" and stored is torch.bfloat16:
            yield Advice(
                code="narrow_precision",
                message="mixed_precision is 'fp16', but the model is stored in bfloat16: its activations may exceed "
                "65,504, the largest value of fp16, even though its weights are kept in float32.",
                hint=f"Use {better!r}.",
                patch={"mixed_precision": better},
                evidence={"stored": "bfloat16"},
            )
        elif self.plan_inputs.device == "cpu":
            yield Advice(
                code="slow_precision",
                message=f"mixed_precision is {precision!r}, which is several times slower than 'no' on a CPU without "
                "instructions for it.",
                hint="Use 'no', unless this CPU supports avx512_bf16, amx, or ARM's bf16.",
                patch={"mixed_precision": "no"},
            )
        elif precision == "bf16" and not self.plan_inputs.supports_bf16:
            other = "fp16" if self.plan.strategy == "replicated" else "no"
            yield Advice(
                code="emulated_precision",
                message="mixed_precision is 'bf16', which this GPU does not support natively; emulation is slow.",
                hint=f"Use {other!r}.",
                patch={"mixed_precision": other},
            )

    def _positions(self) -> Iterator[Advice]:
        limit = num_positions(self.model)
        if limit is not None and self.plan.seq_len > limit and self.located.pretrained:
            yield Advice(
                code="beyond_positions",
                message=f"seq_len is {self.plan.seq_len}, but the model was trained with at most {limit} positions and "
                "has not learned longer ones.",
                hint=f"Use at most {limit}, unless you want to train it on longer sequences.",
                patch={"seq_len": limit},
            )


def vocabulary_patch(options: TrainerOptions, model: object, located: LocatedModel, num_tokens: int) -> Patch | None:
    """The patch that makes tokenizer and model match: more embedding rows, or the pretrained model's own tokenizer."""
    if isinstance(model, ConfigModel):
        return {"model": {"config": {"vocab_size": num_tokens}}}
    if options.tokenizer is not None and located.has_tokenizer:
        return {"tokenizer": None}
    return None


def padding_advice(
    tokenizer: Any,
    sequences: Sequences,
    loss_function: LossFunction,
    plan: Plan,
    options: TrainerOptions,
    isolation: IsolationFinding,
) -> Advice | None:
    """Explain how sequences are padded if the tokenizer has no padding token.

    A shorter sequence is filled with ids of real tokens after its last token. Causal attention ignores them, and they
    have no targets, so no new token or embedding row is needed. The model also learns the end of a document, which it
    does not if the end token is used as padding. If ``pack`` was turned off, the advice has a patch if the model can
    isolate packed documents.
    """
    masks = loss_function.convention is not Convention.RETURN_LOSS
    if not masks or not sequences.pads or getattr(tokenizer, "pad_token", "") is not None:
        return None
    fills = options.pack is False and plan.beta is None and bool(isolation.isolates)
    return Advice(
        code="tokenizer_without_padding",
        message="The tokenizer has no padding token, and none is needed: the padding of shorter sequences is ignored "
        "by attention and excluded from the loss. The tokenizer and the embedding are not changed.",
        hint="With pack, there is little padding: several documents share a sequence without attending to each other."
        if fills
        else None,
        patch={"pack": True} if fills else None,
        evidence={"pad_token": None, "pack": plan.pack, "mean_tokens": round(sequences.mean_length, 1)},
    )
