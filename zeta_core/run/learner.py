"""Preparing the model for training: its trainable and saved parameters, its initial weights, and its loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from zeta_core.advice import RunAdvisor, padding_advice
from zeta_core.checkpoint.weights import SavedWeights, load_weights
from zeta_core.contract.spec.options import Lora
from zeta_core.data.tokens import TokenFile
from zeta_core.data.tokens.end_tokens import find_end_tokens
from zeta_core.memory.limits import check_before_training
from zeta_core.model.export import Exporter
from zeta_core.model.inspection import embedding_rows
from zeta_core.model.lora import target_parameters
from zeta_core.model.lora_coverage import describe_coverage, num_base_weights, unadapted_weights
from zeta_core.model.preparation import prepare_model, trained_precision
from zeta_core.model.special_tokens import SpecialTokens
from zeta_core.objective.loss import LossFunction
from zeta_core.objective.loss_probe import find_loss_function
from zeta_core.objective.preference import preference_loss
from zeta_core.parallel.deferred_weights import DeferredWeights, defer_weights
from zeta_core.report.reporter import Reporter
from zeta_core.run.decision import Decision, choose_sample_ids
from zeta_core.run.inputs import Inputs, ResumePoint, tokenizer_of_data
from zeta_core.run.request import RunRequest
from zeta_core.run.resolved_spec import saves_merged

MIN_ENDED_SHARE = 0.5  # warn if a smaller share of answers or documents ends with an end token


@dataclass(frozen=True)
class Learner:
    """A model that is not sharded yet. ``num_parameters`` counts the parameters before an adapter was added.

    ``ends`` are the tokens that end an answer or a document.
    """

    model: nn.Module
    loss_function: LossFunction
    saved: SavedWeights
    export: Exporter
    num_parameters: int
    num_trained: int
    ends: frozenset[int]
    weights: DeferredWeights | None = None  # of a model without storage; the engine removes those that it has read


def prepare(
    request: RunRequest,
    inputs: Inputs,
    decision: Decision,
    model: nn.Module,
    resume_point: ResumePoint | None,
    report: Reporter,
) -> Learner:
    """Prepare ``model`` for training, in place. Raises if it can't learn this data, or can't fit into memory."""
    plan, tokens = decision.plan, decision.training_data.tokens
    num_parameters = num_base_weights(model)
    if plan.lora is not None and not request.continues_adapter:
        _warn_of_unadapted_weights(model, Lora(**plan.lora), report)
    special = _special_tokens(request, inputs, tokens, model, report)
    merge = saves_merged(request.options)
    saved, export = prepare_model(
        model, inputs.located, plan, inputs.tokenizer, special, merge=merge, defers=request.maps_weights
    )
    if export.adapter is not None:
        report.log(describe_coverage(model, num_parameters))
    _report_notes(export, report)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if resume_point is not None:
        load_weights(model, resume_point.checkpoint.directory, saved.names, mapped=request.maps_weights)
    loss_function = _loss_function_of(model, inputs, decision)
    if padding := padding_advice(
        inputs.tokenizer, decision.sequences, loss_function, plan, request.options, decision.isolation
    ):
        report.advise(padding) if padding.patch else report.log(padding.message)
    weights = None
    if request.maps_weights and inputs.located.build_exact is None:
        report.log(
            "Each process builds the whole model in its memory before it is sharded. Only models whose safetensors "
            "files contain weights in a single precision are read in parts."
        )
    if request.maps_weights and plan.strategy == "fsdp2":
        weights = defer_weights(model, trained_precision(plan) if export.adapter is None else None)
    check_before_training(model, plan, decision.sequences.mean_length, may_split=decision.may_split)
    ends = frozenset() if special is None else special.ends
    return Learner(model, loss_function, saved, export, num_parameters, num_trained, ends, weights)


def _report_notes(export: Exporter, report: Reporter) -> None:
    """Report what was changed in the adapter or in the saved config, so that libraries can load the checkpoints."""
    if export.adapter is not None and export.adapter.note is not None:
        report.warn("embeddings_resized", export.adapter.note)
    if export.skeleton is not None:
        for note in export.skeleton.notes:
            report.warn("saved_config_repaired", note)
        if export.skeleton.changed_end is not None:
            report.log(export.skeleton.changed_end)


def _loss_function_of(model: nn.Module, inputs: Inputs, decision: Decision) -> LossFunction:
    """The loss of the plan's method. Raises if the model can't compute it for this data."""
    plan, tokens = decision.plan, decision.training_data.tokens
    loss_function = find_loss_function(
        model,
        sample_ids=choose_sample_ids(tokens),
        isolation=decision.isolation.isolation if plan.pack else None,
        largest_id=inputs.largest_id,
        vocab_size=embedding_rows(model),
    )
    if plan.strategy == "zero":  # gathers the parameters for each call of the head, whose number differs by rank
        loss_function = replace(loss_function, head=None)
    if plan.beta is not None:
        loss_function = preference_loss(
            loss_function,
            plan.method,
            type(model).__name__,
            beta=plan.beta,
            kind=plan.dpo_loss,
            weights=(plan.desirable_weight, plan.undesirable_weight),
        )
    loss_function.check_labels(type(model).__name__, needed=tokens.supervised is not None)
    return loss_function


def _warn_of_unadapted_weights(model: nn.Module, lora: Lora, report: Reporter) -> None:
    missed = unadapted_weights(model, target_parameters(model, lora))
    if missed.is_significant:
        report.warn(
            "weights_not_adapted",
            missed.message(quantize=lora.quantize),
            hint="Name them in lora.target_parameters ('all-experts' for stacked experts), or train without lora.",
            evidence={"share": round(missed.share, 4), "parameters": list(missed.names)},
        )


def build_advisor(request: RunRequest, inputs: Inputs, decision: Decision, learner: Learner) -> RunAdvisor:
    """The properties of the run that advice is based on."""
    return RunAdvisor(
        request.options,
        decision.plan,
        decision.plan_inputs,
        inputs.located,
        learner.model,
        learner.loss_function,
        decision.isolation,
        decision.training_data.tokens.num_documents,
    )


def _special_tokens(
    request: RunRequest, inputs: Inputs, tokens: TokenFile, model: nn.Module, report: Reporter
) -> SpecialTokens | None:
    """The tokenizer's special tokens and the taught ends; warn if there are none. None if there is no tokenizer."""
    tokenizer = tokenizer_of_data(request, inputs)
    if tokenizer is None:
        return None
    ends = find_end_tokens(tokens, tokenizer)
    if ends.share < MIN_ENDED_SHARE:
        what = "answers" if tokens.supervised is not None else "documents"
        share = "None" if not ends.ids else f"Only {ends.share:.0%}"
        report.warn(
            "no_end_token",
            f"{share} of the {what} to train on end with an end token, so the model does not learn to stop generating.",
            hint="Use a tokenizer with an eos_token, and a chat template that ends each answer with a special token.",
            evidence={"share": ends.share, "eos_token": tokenizer.eos_token},
        )
    return SpecialTokens(tokenizer, ends.ids, not inputs.located.pretrained, embedding_rows(model))
