"""Reporting the decisions of a run: the resolved spec, and the differences after a resume."""

from __future__ import annotations

from typing import Any

from zeta_core.checkpoint.training_state import TrainingProgress
from zeta_core.contract.job.data_report import DataReport
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.options import Lora
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.data.documents.rendering import train_on_by_format
from zeta_core.data.tokens import TokenFile
from zeta_core.objective.evaluation import stopped_early
from zeta_core.plan import Plan, PlanInputs, SequenceStats, fits_on_cpu
from zeta_core.report.reporter import Reporter


def saves_merged(options: TrainerOptions) -> bool:
    """Whether the merged model is saved as well."""
    return options.lora is not None and options.lora.save_merged


def resolved_spec(options: TrainerOptions, plan: Plan, held_out: TokenFile | None, data: DataReport) -> ResolvedSpec:
    """The options with all defaults resolved, and the facts that determined them."""
    numbers = plan.stored()
    # Added below under the names of the contract.
    for name in ("global_batch", "warmup", "beta", "dpo_loss", "desirable_weight", "undesirable_weight"):
        del numbers[name]
    if plan.lora is not None:
        numbers["lora"] = Lora(**plan.lora, save_merged=saves_merged(options)).model_dump()
    if held_out is not None:
        numbers |= {"eval_documents": held_out.num_documents, "eval_tokens": held_out.num_tokens}
    decided: dict[str, Any] = {
        **options.model_dump(mode="json"),
        **numbers,
        "train_on": options.train_on or train_on_by_format(data.formats, data.masks),
        "data_report": data.model_dump(mode="json"),
        "warmup_steps": plan.warmup_steps,
        "global_batch_size": plan.global_batch,
        "dtype": {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[plan.mixed_precision],
        **_preference_settings(plan),
    }
    return ResolvedSpec.model_validate(decided)


def _preference_settings(plan: Plan) -> dict[str, Any]:
    """The settings of the method; those of other methods are null."""
    settings = {
        "dpo": {"loss": plan.dpo_loss, "beta": plan.beta},
        "kto": {
            "beta": plan.beta,
            "desirable_weight": plan.desirable_weight,
            "undesirable_weight": plan.undesirable_weight,
        },
        "orpo": {"beta": plan.beta},
    }
    return {method: values if method == plan.method else None for method, values in settings.items()}


def describe_defaults(options: TrainerOptions, plan: Plan, plan_inputs: PlanInputs) -> str | None:
    """One sentence with the defaults that were chosen by the kind of run and the amount of data, and why."""
    kind = (
        plan.method.upper()
        if plan.method != "sft"
        else "training from scratch"
        if plan_inputs.from_scratch
        else "fine-tuning"
    )
    chosen: list[str] = []
    if options.epochs is None and plan.epochs is not None:
        chosen.append(f"{plan.epochs:g} epoch{'' if plan.epochs == 1 else 's'} ({kind})")
    if options.batch_size is None:
        reason = (
            kind
            if plan_inputs.from_scratch
            else _reason_of_batch(plan, plan_inputs.stats_by_packing[plan.pack].num_sequences)
        )
        chosen.append(f"a global batch of {plan.global_batch} ({reason})")
    if options.pack is None and not plan.pack and True in plan_inputs.stats_by_packing:
        chosen.append(
            f"one document per sequence ({_reason_not_to_pack(plan_inputs.stats_by_packing[True], plan_inputs)})"
        )
    if not chosen:
        return None
    return f"Defaults: {'; '.join(chosen)}."


def _reason_not_to_pack(packed: SequenceStats, plan_inputs: PlanInputs) -> str:
    if fits_on_cpu(plan_inputs, packed.longest):
        return f"packing would leave only {packed.num_sequences:,}"
    return f"one packed sequence of {packed.longest:,} tokens exceeds the memory for activations on a CPU"


def _reason_of_batch(plan: Plan, num_sequences: int) -> str:
    if plan.global_batch == defaults.MAX_GLOBAL_BATCH:
        return f"the most by default, for {num_sequences:,} sequences"
    at_least = f", at least one per process on {plan.world_size}" if plan.world_size > 1 else ""
    return f"about 1/{defaults.BATCHES_PER_EPOCH} of {num_sequences:,} sequences{at_least}"


def report_resume(
    report: Reporter, progress: TrainingProgress, plan: Plan, before: dict[str, Any], *, threads_set: bool
) -> None:
    """Report where a resumed run continues, and what differs from before."""
    report.log(f"Resumed after step {progress.step} of {plan.total_steps}.")
    if stopped_early(progress, plan):
        report.log("This run stopped early and is finished; start from its weights to train it further.")
    elif progress.step >= plan.total_steps:
        report.log("This run is finished; raise max_steps or epochs to train it further.")
    elif before["total_steps"] != plan.total_steps:
        report.warn(
            "schedule_changed",
            f"The run now has {plan.total_steps} steps instead of {before['total_steps']}; from here on, the learning "
            "rate follows the schedule for the new length.",
        )
    if before["world_size"] != plan.world_size:
        report.warn(
            "world_size_changed",
            f"The run continues with {plan.world_size} process{'es' if plan.world_size > 1 else ''} instead of "
            f"{before['world_size']}: each step trains on the same {plan.global_batch} sequences, now in "
            f"{plan.gradient_accumulate_every} x {plan.batch_size} per process, but with different random numbers for "
            "dropout, and sums are rounded differently.",
        )
    if threads_set and plan.threads > 1:  # with a single thread, results do not depend on how it was set
        report.warn(
            "threads_changed",
            f"The run uses {plan.threads} threads, as before, but the number was set after torch had started, which "
            f"can change the last bits of a gradient; start it with OMP_NUM_THREADS={plan.threads} to avoid this.",
        )


def warn_of_device_change(report: Reporter, before: str | None, now: str | None) -> None:
    """Warn that results may differ, because another kind of device has other kernels. Unknown kinds are ignored."""
    if before is None or now is None or before == now:
        return
    report.warn(
        "device_changed",
        f"This attempt runs on {now}, and the attempt that it continues ran on {before}. Other kernels round "
        "differently, so from here on the results can differ in their last bits from those of a run on a single kind "
        "of device.",
    )
