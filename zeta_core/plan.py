"""Deciding all defaults of a run once, at its first start, and the settings that a later attempt may change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.affects import options_affecting
from zeta_core.contract.spec.job_spec import JobSpec, TrainerOptions
from zeta_core.contract.spec.options import Dpo, Kto, Lora, Method, Optimizer, Orpo, Precision, Schedule
from zeta_core.contract.spec.range_test import FIND
from zeta_core.contract.spec.sources import PREFERENCE_FORMATS
from zeta_core.failures import CannotResume, CannotTrain
from zeta_core.optim.schedule import warmup_updates

# Limits of a micro-batch on a CPU. There, the operating system kills a process that runs out of memory, instead of
# raising an error. These are small enough for any machine that can hold the model, and larger ones are not faster.
CPU_MICRO_BATCH_TOKENS = 8192
CPU_ACTIVATION_BYTES = 2 << 30

# What determined the micro-batch: the spec, the run that is resumed, the default global batch (all of it fits), the
# estimated memory, or the memory that ran out.
BatchSizeOrigin = Literal["given", "resumed", "global_batch", "estimated_memory", "exhausted_memory"]

EVALUATIONS = 10  # per run if eval_steps is unset, evenly spaced, the last one after the last step


@dataclass(frozen=True)
class Plan:
    """The decided settings of a run. Batches count sequences; a step is an optimizer step; ``warmup`` is unresolved.

    ``learning_rate`` is 0 until the range test has found it.
    """

    seed: int
    seq_len: int
    pack: bool
    global_batch: int
    batch_size: int
    gradient_accumulate_every: int
    learning_rate: float
    weight_decay: float
    optimizer: Optimizer
    lr_scheduler: Schedule
    warmup: float
    max_grad_norm: float
    mixed_precision: Precision
    strategy: str
    use_activation_checkpointing: bool
    compile: bool
    threads: int
    device_kind: str | None  # the devices of this attempt; a later attempt on different ones emits a warning
    world_size: int
    first_world_size: int  # at the first start, when batch_size x gradient_accumulate_every gave the global batch
    epochs: float | None  # None: max_steps was given
    total_steps: int
    total_sequences: int
    group_by: str | None  # the column of groups that eval_split keeps together
    data: str  # fingerprint of the tokens
    template_date: str | None  # the date that a chat template renders; None: unknown, or not needed
    eval_data: str | None  # fingerprint of the tokens of eval_dataset
    eval_split: float | None
    eval_steps: int | None  # None: nothing is evaluated
    early_stopping_patience: int | None
    lora: dict[str, Any] | None  # settings that determine the adapter; saving it merged does not affect training
    freeze: list[str]
    beta: float | None  # of a method that learns preferences; None: sft
    base: str | None  # fingerprint of the weights that an adapter is added to
    attn_implementation: str = "auto"  # transformers' name of the model's own, if none was chosen
    lr_min: float = 0.0
    dpo_loss: str = "sigmoid"
    batch_size_origin: BatchSizeOrigin = "given"
    method: Method = "sft"
    desirable_weight: float = 1.0  # these weights are those of method kto
    undesirable_weight: float = 1.0
    deterministic: bool = False
    fsdp_shards: int | None = None  # processes that share a copy of the model; None: all of them

    @property
    def evaluates(self) -> bool:
        return self.eval_data is not None or bool(self.eval_split)

    @property
    def num_shards(self) -> int:
        """The number of processes that share a copy of the model, if the strategy shards it."""
        return self.fsdp_shards or self.world_size

    @property
    def warmup_steps(self) -> int:
        return warmup_updates(self.warmup, self.total_steps)

    def with_half_the_micro_batch(self) -> Plan:
        """The same global batch in twice as many micro-batches (the last one may be smaller)."""
        half = self.batch_size // 2
        return replace(
            self,
            batch_size=half,
            gradient_accumulate_every=-(-self.global_batch // (half * self.world_size)),
            batch_size_origin="exhausted_memory",
        )

    def stored(self) -> dict[str, Any]:
        return asdict(self)


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


@dataclass(frozen=True)
class SequenceStats:
    """The number of sequences that the training data is cut into, and the tokens of the longest one."""

    num_sequences: int
    longest: int


@dataclass(frozen=True)
class PlanInputs:
    """The properties of the model, the data and the machine that a plan depends on.

    ``stats_by_packing`` describes the training sequences with and without packing; it has one entry if packing is
    decided already, and none before the data is known.
    """

    world_size: int
    device: str  # "cpu" or "cuda"
    supports_bf16: bool
    threads: int
    positions: int | None
    values_per_token: int  # a rough count of the activations that are saved per token for the backward pass
    free_bytes: int  # free memory of a CPU host
    from_scratch: bool
    data: str
    eval_data: str | None = None
    base: str | None = None  # fingerprint of the base model's weights
    device_kind: str | None = None
    template_date: str | None = None
    has_adapter: bool = False  # in the model itself, not from the options
    attn_implementation: str = "auto"
    micro_batch_tokens: int | None = None  # that fit into the memory of every GPU, as estimated; None: unknown
    packs: bool = True  # whether the model allows several documents in a sequence by default
    stats_by_packing: Mapping[bool, SequenceStats] = field(default_factory=dict[bool, SequenceStats])


def resolve_seed(options: TrainerOptions, stored: dict[str, Any] | None) -> int:
    """The run's seed: the requested one, else that of the resumed run, else the default."""
    if options.seed is not None:
        return options.seed
    return defaults.SEED if stored is None else int(stored["seed"])


def decide_plan(options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None) -> Plan:
    """The plan without its length, which `with_length` adds. ``stored`` is the plan of the run that is resumed.

    Fields that the caller set must agree with ``stored`` if they are in `FIXED_PLAN_FIELDS`; unset fields take the
    stored value. Raises `CannotResume` naming the first field that does not agree.
    """
    pack = _packs(options, inputs, stored)
    batch_size, accumulate, global_batch, origin = _split(options, inputs, stored, pack=pack)
    if stored is not None and batch_size == stored["batch_size"]:
        origin = stored.get("batch_size_origin", origin)
    plan = Plan(
        seed=resolve_seed(options, stored),
        seq_len=defaults.seq_len(options, inputs.positions or defaults.MAX_DEFAULT_SEQ_LEN) or 0,
        pack=pack,
        global_batch=global_batch,
        batch_size=batch_size,
        gradient_accumulate_every=accumulate,
        learning_rate=defaults.learning_rate(options, from_scratch=inputs.from_scratch, has_adapter=inputs.has_adapter)
        or 0.0,
        weight_decay=defaults.WEIGHT_DECAY if options.weight_decay is None else options.weight_decay,
        optimizer=options.optimizer,
        lr_scheduler=options.lr_scheduler,
        warmup=options.warmup_steps,
        max_grad_norm=options.max_grad_norm,
        mixed_precision=options.mixed_precision or ("bf16" if inputs.supports_bf16 else "no"),
        strategy=choose_strategy(options),
        use_activation_checkpointing=options.use_activation_checkpointing,
        compile=options.compile,
        deterministic=options.deterministic,
        fsdp_shards=options.fsdp_shards,
        threads=inputs.threads,
        device_kind=inputs.device_kind,
        world_size=inputs.world_size,
        first_world_size=inputs.world_size if stored is None else _first_world_size(stored),
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
        lora=None if options.lora is None else _adapter_settings(options.lora),
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
    if plan.lr_min > plan.learning_rate > 0:
        raise CannotTrain(
            f"lr_min is {plan.lr_min:g}, which exceeds the default learning rate of this run, {plan.learning_rate:g}; "
            "decrease it, or set learning_rate.",
            param="lr_min",
        )
    return plan if stored is None else _resumed(plan, options, stored)


_LATER_LORA_SETTINGS = frozenset({"modules_to_save", "target_parameters", "use_rslora", "use_dora"})


def _adapter_settings(lora: Lora) -> dict[str, Any]:
    """The settings that determine the adapter. Those that earlier versions lacked are omitted if they are unset."""
    settings = lora.model_dump(exclude={"save_merged"})
    return {name: value for name, value in settings.items() if name not in _LATER_LORA_SETTINGS or value}


def _trains_adapter(options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None) -> bool:
    return options.lora is not None or inputs.has_adapter or (stored is not None and bool(stored.get("lora")))


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


def choose_strategy(options: TrainerOptions) -> str:
    if options.use_fsdp:
        return "fsdp2"
    return "zero" if options.use_deepspeed else "replicated"


def _split(
    options: TrainerOptions, inputs: PlanInputs, stored: dict[str, Any] | None, *, pack: bool
) -> tuple[int, int, int, BatchSizeOrigin]:
    """Micro-batch, accumulation, global batch and the origin: as given, else as stored, else the default by device.

    With another number of processes than at the first start, the stored global batch is split anew. It need not be a
    multiple of the number of processes: in a micro-step, some of them then have one sequence less than the others.
    """
    batch_size, accumulate = defaults.batch_split(options)
    world_size = inputs.world_size
    if stored is not None and world_size != _first_world_size(stored):
        global_batch = int(stored["global_batch"])
        share = math.ceil(global_batch / world_size)
        batch_size = min(batch_size or stored["batch_size"], share)
        if global_batch % world_size == 0:  # equal micro-batches on all processes
            while share % batch_size:
                batch_size -= 1
        return batch_size, math.ceil(share / batch_size), global_batch, "resumed"
    if batch_size is not None and accumulate is not None:
        return batch_size, accumulate, batch_size * accumulate * world_size, "given"
    if stored is not None and accumulate is None:
        return stored["batch_size"], stored["gradient_accumulate_every"], stored["global_batch"], "resumed"
    stats = inputs.stats_by_packing.get(pack)
    global_batch = (
        defaults.global_batch(
            None if stats is None else stats.num_sequences, world_size, from_scratch=inputs.from_scratch
        )
        if stored is None
        else int(stored["global_batch"])
    )
    if accumulate is not None:
        batch_size = defaults.split_micro_batch(global_batch, accumulate, world_size)
        return batch_size, accumulate, batch_size * accumulate * world_size, "given"
    share = global_batch // world_size
    batch_size = min(share, _sequences_in_memory(options, inputs, pack=pack) or share)
    origin: BatchSizeOrigin = "global_batch" if batch_size == share else "estimated_memory"
    while share % batch_size:
        batch_size -= 1
    return batch_size, share // batch_size, share * world_size, origin


def _first_world_size(stored: dict[str, Any]) -> int:
    return int(stored.get("first_world_size", stored["world_size"]))


def _sequences_in_memory(options: TrainerOptions, inputs: PlanInputs, *, pack: bool) -> int | None:
    """The number of the longest sequences that a micro-batch can have, at least 1; None if that is unknown."""
    seq_len = defaults.seq_len(options, inputs.positions or defaults.MAX_DEFAULT_SEQ_LEN) or 1
    length = inputs.stats_by_packing[pack].longest if pack in inputs.stats_by_packing else seq_len
    is_cpu = inputs.device == "cpu"
    tokens = min(CPU_MICRO_BATCH_TOKENS, _cpu_tokens(inputs)) if is_cpu else inputs.micro_batch_tokens
    return None if tokens is None else max(1, tokens // max(1, length))


def fits_on_cpu(inputs: PlanInputs, length: int) -> bool:
    """Whether one sequence of ``length`` tokens is within the CPU's limits for activations; always true on a GPU."""
    return inputs.device != "cpu" or length <= _cpu_tokens(inputs)


def _cpu_tokens(inputs: PlanInputs) -> int:
    """The tokens whose activations fit into `CPU_ACTIVATION_BYTES` and half of the free memory of the host."""
    bytes_per_token = 4 * max(1, inputs.values_per_token)
    return min(CPU_ACTIVATION_BYTES, inputs.free_bytes // 2 // inputs.world_size) // bytes_per_token


_OPTION_NAMES = {
    "warmup": "warmup_steps",
    "global_batch": "batch_size",
    "strategy": "use_fsdp/use_deepspeed",
    "dpo_loss": "dpo.loss",
    "desirable_weight": "kto.desirable_weight",
    "undesirable_weight": "kto.undesirable_weight",
}


def _resumed(plan: Plan, options: TrainerOptions, stored: dict[str, Any]) -> Plan:
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
