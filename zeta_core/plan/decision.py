"""Deciding all defaults of a run once, at its first start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.options import Dpo, Kto, Lora, Orpo
from zeta_core.failures import CannotTrain
from zeta_core.plan.batch_split import first_world_size, fits_on_cpu, split_batch
from zeta_core.plan.continuation import continued_plan
from zeta_core.plan.plan import Plan, PlanInputs

EVALUATIONS = 10  # per run if eval_steps is unset, evenly spaced, the last one after the last step


def resolve_seed(options: TrainerOptions, stored: dict[str, Any] | None) -> int:
    """The run's seed: the requested one, else that of the resumed run, else the default."""
    if options.seed is not None:
        return options.seed
    return defaults.SEED if stored is None else int(stored["seed"])


def decide_plan(options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None) -> Plan:
    """The plan without its length, which `with_length` adds. ``stored`` is the plan of the run that is resumed.

    Options that the caller set must agree with ``stored`` if they determine one of the `FIXED_PLAN_FIELDS`; unset ones
    take the stored value. Raises `CannotTrain`, or `CannotResume` naming the first field that does not agree.
    """
    pack = _packs(options, inputs, stored)
    batches = split_batch(options, inputs, stored, pack=pack)
    origin = batches.origin
    if stored is not None and batches.batch_size == stored["batch_size"]:
        origin = stored.get("batch_size_origin", origin)
    plan = Plan(
        seed=resolve_seed(options, stored),
        seq_len=defaults.seq_len(options, inputs.positions or defaults.MAX_DEFAULT_SEQ_LEN) or 0,
        pack=pack,
        global_batch=batches.global_batch,
        batch_size=batches.batch_size,
        gradient_accumulate_every=batches.gradient_accumulate_every,
        learning_rate=defaults.learning_rate(options, from_scratch=inputs.from_scratch, has_adapter=inputs.has_adapter)
        or 0.0,
        weight_decay=defaults.WEIGHT_DECAY if options.weight_decay is None else options.weight_decay,
        optimizer=options.optimizer,
        lr_scheduler=options.lr_scheduler,
        warmup=options.warmup_steps,
        max_grad_norm=options.max_grad_norm,
        mixed_precision=options.mixed_precision or ("bf16" if inputs.supports_bf16 or options.bf16_weights else "no"),
        strategy=_strategy(options),
        use_activation_checkpointing=options.use_activation_checkpointing,
        compile=options.compile,
        deterministic=options.deterministic,
        fsdp_shards=options.fsdp_shards,
        fsdp_keep_gradients=options.fsdp_keep_gradients,
        fsdp_cpu_offload=options.fsdp_cpu_offload,
        optimizer_states=options.optimizer_states,
        bf16_weights=options.bf16_weights,
        threads=inputs.threads,
        device_kind=inputs.device_kind,
        world_size=inputs.world_size,
        first_world_size=inputs.world_size if stored is None else first_world_size(stored),
        epochs=_epochs(options, inputs, stored),
        total_steps=0,
        total_sequences=0,
        data=inputs.data,
        template_date=inputs.template_date,
        eval_data=inputs.eval_data,
        eval_split=options.eval_split or None,
        group_by=options.group_by,
        eval_steps=options.eval_steps,
        early_stopping_patience=options.early_stopping_patience,
        lora=None if options.lora is None else _adapter_settings(options.lora, inputs.continued_adapter),
        freeze=options.freeze,
        base=inputs.base if _trains_adapter(options, inputs, stored) else None,
        attn_implementation=inputs.attn_implementation,
        method=options.method,
        beta=_beta(options),
        dpo_loss=(options.dpo or Dpo()).loss,
        desirable_weight=(options.kto or Kto()).desirable_weight,
        undesirable_weight=(options.kto or Kto()).undesirable_weight,
        lr_min=options.lr_min or 0.0,
        batch_size_origin=origin,
    )
    _check_minimum_learning_rate(plan)
    _check_offloading(plan, inputs)
    _check_weights(plan, inputs)
    return plan if stored is None else continued_plan(plan, options, stored)


def with_length(plan: Plan, options: TrainerOptions, num_sequences: int) -> Plan:
    """The plan with its number of steps: ``max_steps`` full batches, or the epochs' sequences to the last one."""
    if options.max_steps is not None:
        steps, sequences = options.max_steps, options.max_steps * plan.global_batch
    else:
        assert plan.epochs is not None
        sequences = max(1, round(plan.epochs * num_sequences))
        steps = math.ceil(sequences / plan.global_batch)
    eval_steps = plan.eval_steps or (math.ceil(steps / EVALUATIONS) if plan.evaluates else None)
    return replace(plan, total_steps=steps, total_sequences=sequences, eval_steps=eval_steps)


def _check_offloading(plan: Plan, inputs: PlanInputs) -> None:
    if plan.use_activation_checkpointing == "offload" and inputs.device == "cpu":
        raise CannotTrain(
            "use_activation_checkpointing is 'offload', which has no effect on a CPU; use true or 'selective'.",
            param="use_activation_checkpointing",
        )
    if plan.fsdp_cpu_offload and inputs.device == "cpu":
        raise CannotTrain(
            "fsdp_cpu_offload is true, which has no effect on a CPU, where everything is in the memory of the host "
            "already; omit it.",
            param="fsdp_cpu_offload",
        )


def _check_weights(plan: Plan, inputs: PlanInputs) -> None:
    if plan.bf16_weights is not None and inputs.has_adapter:
        raise CannotTrain(
            "bf16_weights is set, but the model's adapter is trained in float32; omit it.", param="bf16_weights"
        )


def _check_minimum_learning_rate(plan: Plan) -> None:
    if plan.lr_min > plan.learning_rate > 0:
        raise CannotTrain(
            f"lr_min is {plan.lr_min:g}, which exceeds the default learning rate of this run, {plan.learning_rate:g}; "
            "decrease it, or set learning_rate.",
            param="lr_min",
        )


def _epochs(options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None) -> float | None:
    if options.max_steps is None and options.epochs is None and stored is not None and stored.get("epochs"):
        return float(stored["epochs"])
    return defaults.epochs(options, from_scratch=inputs.from_scratch)


def _packs(options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None) -> bool:
    """Whether to pack documents: as requested, else as stored, else by the model and the amount of data."""
    if options.method != "sft":
        return False  # each answer has its own row
    if options.pack is not None:
        return options.pack
    if stored is not None:
        return bool(stored["pack"])
    packed, unpacked = inputs.stats_by_packing.get(True), inputs.stats_by_packing.get(False)
    if not inputs.packs or packed is None or unpacked is None:
        return inputs.packs
    if not fits_on_cpu(inputs, packed.longest) and fits_on_cpu(inputs, unpacked.longest):
        return False
    return defaults.packs(packed.num_sequences, unpacked.num_sequences, from_scratch=inputs.from_scratch)


def _beta(options: TrainerOptions) -> float | None:
    settings = {"dpo": options.dpo or Dpo(), "kto": options.kto or Kto(), "orpo": options.orpo or Orpo()}
    return None if options.method == "sft" else settings[options.method].beta


def _strategy(options: TrainerOptions) -> str:
    if options.use_fsdp:
        return "fsdp2"
    return "zero" if options.use_deepspeed else "replicated"


_LATER_LORA_SETTINGS = frozenset({"modules_to_save", "target_parameters", "use_rslora", "use_dora", "continue_adapter"})


def _adapter_settings(lora: Lora, continued: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine the adapter, or those of the ``continued`` one.

    Those that earlier versions lacked are omitted if they are unset.
    """
    settings = {**lora.model_dump(exclude={"save_merged"}), **continued}
    return {name: value for name, value in settings.items() if name not in _LATER_LORA_SETTINGS or value}


def _trains_adapter(options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None) -> bool:
    return options.lora is not None or inputs.has_adapter or (stored is not None and bool(stored.get("lora")))
