"""What was decided of a run, as its readers are told it: the resolved spec, and what a resumed run does otherwise."""

from __future__ import annotations

from typing import Any

from zeta_core.checkpoint.state import Progress
from zeta_core.contract import defaults
from zeta_core.contract.data_report import DataReport
from zeta_core.contract.spec import TrainerOptions
from zeta_core.data.encode import train_on_by_format
from zeta_core.data.tokens import TokenFile
from zeta_core.objective.evaluation import stopped_early
from zeta_core.plan import Plan
from zeta_core.report.journal import Report


def merges(options: TrainerOptions) -> bool:
    """Whether the base with the adapter added is saved, too."""
    return options.lora is not None and options.lora.save_merged


def resolved_spec(options: TrainerOptions, plan: Plan, held_out: TokenFile | None, data: DataReport) -> dict[str, Any]:
    """The options with every default that was decided, and what they were decided from."""
    numbers = plan.stored()
    del numbers["global_batch"], numbers["warmup"], numbers["beta"]  # said below by the names of the contract
    if plan.lora is not None:
        numbers["lora"] = {**plan.lora, "save_merged": merges(options)}
    if held_out is not None:
        numbers |= {"eval_documents": held_out.num_documents, "eval_tokens": held_out.num_tokens}
    decided = {
        **options.model_dump(mode="json"),
        **numbers,
        "train_on": options.train_on or train_on_by_format(data.formats),
        "data_report": data.model_dump(mode="json"),
        "warmup_steps": plan.warmup_steps,
        "global_batch_size": plan.global_batch,
        "dtype": {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[plan.mixed_precision],
        "dpo": None if plan.beta is None else {"beta": plan.beta},
    }
    if options.max_steps is None:
        decided["epochs"] = defaults.epochs(options)
    return decided


def say_resumed(report: Report, progress: Progress, plan: Plan, before: dict[str, Any], *, threads_told: bool) -> None:
    """Where a resumed run goes on, and what is not as it was before."""
    report.log(f"Resumed after step {progress.step} of {plan.total_steps}.")
    if stopped_early(progress, plan):
        report.log("This run stopped early and is finished; start from its weights to train it further.")
    elif progress.step >= plan.total_steps:
        report.log("This run is finished; raise max_steps or epochs to train it further.")
    elif before["total_steps"] != plan.total_steps:
        report.warn(
            "schedule_changed",
            f"The run has {plan.total_steps} steps now instead of {before['total_steps']}; the learning rate follows "
            "the schedule of the new length from here on.",
        )
    if before["world_size"] != plan.world_size:
        report.warn(
            "world_size_changed",
            f"The run goes on with {plan.world_size} processes instead of {before['world_size']}: the same sequences "
            "in the same order, with other random numbers for dropout.",
        )
    if threads_told and plan.threads > 1:  # one computes alike however it came to be one
        report.warn(
            "threads_changed",
            f"The run computes with {plan.threads} threads, as before, but torch was told so after its start, which "
            f"can change the last bits of a gradient; started with OMP_NUM_THREADS={plan.threads} it does not.",
        )


def warn_of_another_device(report: Report, before: str | None, now: str | None) -> None:
    """Say where exactness ends: another kind of device has other kernels. Unknown kinds are not compared."""
    if before is None or now is None or before == now:
        return
    report.warn(
        "device_changed",
        f"The run was computed on {before} and continues on {now}. Other kernels round differently, so exactness ends "
        "here: the results can differ in their last bits from those of a run that stays on one kind of device.",
    )
