"""Continuing a run with its stored plan: the settings that a later attempt must not change."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from zeta_core.contract.spec.affects import options_affecting
from zeta_core.contract.spec.job_spec import JobSpec, TrainerOptions
from zeta_core.contract.spec.range_test import FIND
from zeta_core.contract.spec.sources import PREFERENCE_FORMATS
from zeta_core.failures import CannotResume
from zeta_core.plan.plan import Plan

# The options that determine a field of the plan, if their names differ from it.
_DECIDING_OPTIONS: dict[str, tuple[str, ...]] = {
    "warmup": ("warmup_steps",),
    "strategy": ("use_fsdp", "use_deepspeed"),
    "data": options_affecting(JobSpec, "documents"),
    "eval_data": ("eval_dataset",),
    "beta": ("method", *PREFERENCE_FORMATS),
    "dpo_loss": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "base": ("model",),
}
_RESULT_OPTIONS = frozenset(options_affecting(JobSpec, "results"))
# The fields that a resumed run must not change. The split of a global batch may change, but not its size.
FIXED_PLAN_FIELDS = tuple(
    name
    for name in (plan_field.name for plan_field in fields(Plan))
    if name == "global_batch" or not _RESULT_OPTIONS.isdisjoint(_DECIDING_OPTIONS.get(name, (name,)))
)

_OPTION_NAMES = {
    "warmup": "warmup_steps",
    "global_batch": "batch_size",
    "strategy": "use_fsdp/use_deepspeed",
    "dpo_loss": "dpo.loss",
    "desirable_weight": "kto.desirable_weight",
    "undesirable_weight": "kto.undesirable_weight",
}


def continued_plan(plan: Plan, options: TrainerOptions, stored: dict[str, Any]) -> Plan:
    """``plan`` with the stored value of each fixed field that the caller did not set.

    Raises `CannotResume` naming the first field that the caller set to another value.
    """
    set_options = {name for name in options.model_fields_set if getattr(options, name) is not None}
    if options.learning_rate == FIND:
        set_options.remove("learning_rate")  # it was found or given when the run started
    set_options |= {"data", "eval_data", "base", "strategy", "global_batch"}
    set_options |= {"method", "beta", "dpo_loss", "desirable_weight", "undesirable_weight"}
    if stored.get("beta") is not None:  # plans of earlier versions have no method, and only DPO had a beta
        stored = {"method": "dpo", **stored}
    values: dict[str, Any] = {}
    for name in FIXED_PLAN_FIELDS:
        if name not in stored:  # saved by a version without this field
            continue
        stored_value, value = stored[name], getattr(plan, name)
        if name in set_options or _OPTION_NAMES.get(name) in set_options:
            if value != stored_value:
                raise CannotResume(_mismatch(name, stored_value, value, plan.method))
        else:
            values[name] = stored_value
    # Bit-identical results need the same number of threads, whatever this machine's default is.
    return replace(plan, **values, threads=stored["threads"])


def _mismatch(name: str, stored_value: object, value: object, method: str) -> str:
    shown = f"{method}.beta" if name == "beta" else _OPTION_NAMES.get(name, name)
    fix = (
        "start from the weights instead: use the checkpoint's directory as model (or load its model.safetensors into "
        "your own module), without resume_from_checkpoint"
    )
    if name == "eval_data":
        return f"eval_dataset differs from the one that the run was started with; use that one again, or {fix}."
    if name == "base":
        return f"The model is not the base that the run was started with; use that one again, or {fix}."
    if name == "data":
        return (
            "The data differs from the data that the run was started with (because of its files, their weights, the "
            f"tokenizer, train_on or overlong), so its order cannot be continued; use the same again, or {fix}."
        )
    if name == "global_batch":
        return f"The global batch is {value} sequences, but the run was started with {stored_value}; keep it, or {fix}."
    if name == "strategy":
        before = {"fsdp2": "use_fsdp", "zero": "use_deepspeed"}.get(str(stored_value), "neither of them")
        return f"{shown} is {value!r}, but the run was started with {before}; use the same again, or {fix}."
    return f"{shown} is {value!r}, but the run was started with {stored_value!r}; omit it, or {fix}."
