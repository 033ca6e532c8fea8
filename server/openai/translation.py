"""Translates a fine-tuning request to a job spec.

The spec consists of the defaults of the base model's name, the fields in ``trainer``, and OpenAI's parameters. A field
that both ``trainer`` and a parameter determine is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.openai.fine_tuning_request import AUTO, DpoHyperparameters, FineTuningRequest
from server.openai.model_names import BaseModelName, CheckpointName
from server.submitting.reruns import apply_merge_patch
from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.range_test import FIND
from zeta_core.contract.spec.validation import error_from_details, invalid_value, parse

MAX_MICRO_BATCH = 8  # examples per forward pass of a batch whose size is given; larger batches are accumulated

# The parameters that determine a field of the spec, for messages.
_ALWAYS = {"model": "model", "dataset": "training_file", "resume_from_checkpoint": "model"}
_PARAMETERS = {"dataset": "training_file", "eval_dataset": "validation_file", "model": "model"}


@dataclass(frozen=True)
class Translation:
    """A job spec as JSON, and the learning rate that ``learning_rate_multiplier`` refers to, if there is one."""

    spec: dict[str, Any]
    base_learning_rate: float | None


def translate(request: FineTuningRequest, model: BaseModelName | CheckpointName) -> Translation:
    """The spec of the request's job.

    Raises `InvalidRequest` with every conflict between ``trainer`` and a parameter, and `InvalidSpec` for the spec.
    """
    given = dict(_parameters(request))
    conflicts = [_conflict(name, parameter) for name, parameter in _ALWAYS.items() if name in request.trainer]
    conflicts += [
        _conflict(name, parameter)
        for parameter, names in given.items()
        for name in names
        if name in request.trainer and name not in _ALWAYS
    ]
    if conflicts:
        raise error_from_details(conflicts, InvalidRequest)
    base: dict[str, Any] = dict(model.defaults) if isinstance(model, BaseModelName) else {}
    for name, alternative in (("max_steps", "epochs"), ("epochs", "max_steps")):
        if request.trainer.get(name) is not None:
            base.pop(alternative, None)
    spec: dict[str, Any] = apply_merge_patch(base, request.trainer)
    spec["model"] = _source(model)
    spec["dataset"] = {"file": request.training_file}
    for parameter, fields in given.items():
        if parameter == "learning_rate_multiplier":
            continue  # it multiplies the default, which is known only below
        spec = {name: value for name, value in {**spec, **fields}.items() if value is not None}
    parsed = parse(JobSpec, spec)
    hyperparameters = request.chosen_hyperparameters
    if isinstance(hyperparameters.batch_size, int):
        spec |= _batch_split(hyperparameters.batch_size, parsed.resources.num_processes)
    rate = _base_learning_rate(parsed)
    multiplier = hyperparameters.learning_rate_multiplier
    if isinstance(multiplier, float):
        if rate is None:
            fix = "the defaults of this model search for the learning rate; set trainer.learning_rate instead"
            raise error_from_details([invalid_value("learning_rate_multiplier", multiplier, fix)], InvalidRequest)
        spec["learning_rate"] = rate * multiplier
    return Translation(spec, rate)


def _source(model: BaseModelName | CheckpointName) -> Any:
    if isinstance(model, CheckpointName):
        return {"job": model.job.id, "checkpoint": model.checkpoint}
    source = model.source
    return source if isinstance(source, str) else source.model_dump(mode="json", exclude_unset=True)


def _parameters(request: FineTuningRequest) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of the spec that each given parameter determines; ``None`` removes a default."""
    chosen = request.chosen_hyperparameters
    if request.validation_file is not None:
        yield "validation_file", {"eval_dataset": {"file": request.validation_file}, "eval_split": None}
    if request.method is not None:
        yield "method.type", {"method": "dpo" if request.method.type == "dpo" else "sft"}
    if isinstance(chosen, DpoHyperparameters) and isinstance(chosen.beta, float):
        yield "beta", {"dpo": {"beta": chosen.beta}}
    if isinstance(chosen.n_epochs, int):
        yield "n_epochs", {"epochs": chosen.n_epochs, "max_steps": None}
    if isinstance(chosen.batch_size, int):
        # Without packing, a sequence is an example. `_batch_split` sets the other two fields.
        pack = {"pack": False} if request.trainer.get("pack") is None else {}
        yield "batch_size", {"batch_size": None, "gradient_accumulate_every": None, **pack}
    if chosen.learning_rate_multiplier not in (None, AUTO):
        yield "learning_rate_multiplier", {"learning_rate": None}
    if request.seed is not None:
        yield "seed", {"seed": request.seed}
    if request.suffix is not None:
        yield "suffix", {"entity_name": request.suffix}
    if request.metadata is not None:
        yield "metadata", {"metadata": request.metadata}
    if request.wandb is not None:
        wandb = request.wandb.model_dump(exclude_defaults=True)
        yield "integrations", {"report_to": ["wandb"], "wandb": wandb}


def _batch_split(batch_size: int, processes: int | None) -> dict[str, int]:
    """The fields that split a batch of this many examples over the processes, and into micro-batches that fit."""
    if processes is None:
        fix = "it can't be divided, because trainer.resources requests all GPUs of a worker; request a number of GPUs"
        raise error_from_details([invalid_value("batch_size", batch_size, fix)], InvalidRequest)
    if batch_size % processes:
        fix = f"it must be a multiple of the {processes} processes that trainer.resources requests"
        raise error_from_details([invalid_value("batch_size", batch_size, fix)], InvalidRequest)
    share = batch_size // processes
    micro_batch = next(size for size in range(min(share, MAX_MICRO_BATCH), 0, -1) if share % size == 0)
    return {"batch_size": micro_batch, "gradient_accumulate_every": share // micro_batch}


def _base_learning_rate(parsed: JobSpec) -> float | None:
    """The rate for the multiplier 1: that of the defaults, or the documented one; ``None`` if a range test finds it."""
    if parsed.learning_rate == FIND:
        return None
    return defaults.learning_rate(parsed, from_scratch=defaults.is_from_scratch(parsed.model))


def _conflict(field: str, parameter: str) -> ErrorDetail:
    return ErrorDetail(
        param=f"trainer.{field}",
        message=f"trainer.{field} and {parameter} both determine this; remove one of them.",
        code="conflicting_parameters",
    )


def in_terms_of_the_request(error: InvalidSpec) -> InvalidSpec:
    """The error about the fields of a spec, with the names of the request's parameters instead."""
    details = [_renamed(detail) for detail in error.details]
    if not details:
        return error
    renamed = error_from_details(details, InvalidSpec)
    return InvalidSpec(renamed.message, code=renamed.code, param=renamed.param, details=details)


def _renamed(detail: ErrorDetail) -> ErrorDetail:
    if detail.param is None:
        return detail
    field, _, rest = detail.param.partition(".")
    name = _PARAMETERS.get(field) or f"trainer.{detail.param}"
    old = detail.param if rest or f"{field}." not in detail.message else field
    message = detail.message.replace(old, name, 1)
    return ErrorDetail(param=name, message=message, code=detail.code, suggestion=detail.suggestion)
