"""Deciding the plan of a run once its model and data are loaded, and cutting the training and evaluation sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from zeta_core.advice import vocabulary_patch
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.data.data_report import nothing_to_train_error
from zeta_core.data.sequences import Sequences
from zeta_core.data.tokens import TokenFile
from zeta_core.data.tokens.flat_files import IdType
from zeta_core.data.tokens.held_out import Overlap, hold_out, num_shared
from zeta_core.environment import ProcessRank
from zeta_core.failures import CannotTrain
from zeta_core.memory.estimate import copying
from zeta_core.memory.micro_batch import micro_batch_tokens
from zeta_core.memory.zero_parts import ZeroSettings
from zeta_core.model.existing_adapter import has_adapter, without_peft_wrapper
from zeta_core.model.inspection import (
    check_positions,
    check_vocabulary,
    embedding_rows,
    head_size,
    plan_inputs_without_data,
)
from zeta_core.model.lora import base_fingerprint
from zeta_core.objective.attention import current_attention
from zeta_core.objective.document_kernel import kernel_problem as find_kernel_problem
from zeta_core.objective.isolation_probe import IsolationFinding, find_isolation, supports_documents
from zeta_core.objective.preference import preference_sequences
from zeta_core.parallel.strategy import check_launcher
from zeta_core.parallel.zero import zero_config
from zeta_core.plan import Plan, PlanInputs, SequenceStats, decide_plan, fits_on_cpu, resolve_seed, with_length
from zeta_core.run.inputs import Inputs, ResumePoint
from zeta_core.run.request import RunRequest


@dataclass(frozen=True)
class DataSplit:
    """The tokens of the training or held-out data, and the sequences that they are cut into."""

    tokens: TokenFile
    sequences: Sequences


@dataclass(frozen=True)
class Decision:
    """The plan and the data. ``may_split`` allows smaller micro-batches when memory runs out."""

    plan_inputs: PlanInputs
    plan: Plan
    isolation: IsolationFinding
    training_data: DataSplit
    held_out: DataSplit | None
    overlap: Overlap
    may_split: bool

    @property
    def sequences(self) -> Sequences:
        return self.training_data.sequences


def build_model(request: RunRequest, inputs: Inputs, resume_point: ResumePoint | None) -> nn.Module:
    """Build the model. Missing weights are initialized with the run's seed.

    A base to quantize, and weights that are sharded, stay memory-mapped. peft's wrapper is removed; the adapted model
    inside it shares its modules.
    """
    torch.manual_seed(resolve_seed(request.options, resume_point.plan if resume_point else None))
    located = inputs.located
    build = located.build
    if request.quantizes:
        build = located.build_mapped or build
    elif request.maps_weights:
        build = located.build_exact or build
    model = without_peft_wrapper(build())
    patch = vocabulary_patch(request.options, request.model, located, inputs.largest_id + 1)
    for tokens in (inputs.tokens, inputs.held_out):
        if tokens is not None and (id_type := IdType.of(tokens)) is not None:
            id_type.check(embedding_rows(model))
    check_vocabulary(model, inputs.largest_id, patch)
    return model


def probe_isolation(request: RunRequest, inputs: Inputs, model: nn.Module) -> IsolationFinding:
    """How the model isolates documents that share a sequence. With preferences, each answer has its own sequence."""
    if request.options.method != "sft":
        return IsolationFinding(None)
    return find_isolation(
        model,
        sample_ids=choose_sample_ids(inputs.tokens),
        largest_id=inputs.largest_id,
        vocab_size=embedding_rows(model),
    )


def choose_attention(
    request: RunRequest,
    inputs: Inputs,
    model: nn.Module,
    resume_point: ResumePoint | None,
    kernel_problem: str | None,
    log: Callable[[str], None],
) -> str:
    """The requested attention; else that of the resumed run, or `varlen` if the model and the device support it.

    ``kernel_problem`` is the reason why the kernel for `varlen` does not work on the GPU of some process. Then `varlen`
    is not the default, and ``log`` gets the reason. Raises `CannotTrain` if `varlen` is requested and the model does
    not support it.
    """
    options = request.options
    stored = {} if resume_point is None else resume_point.plan
    requested = options.attn_implementation
    if requested == "auto" and resume_point is not None:
        return stored.get("attn_implementation", "auto")
    packs = options.method == "sft" and options.pack is not False
    if requested == "auto" and (options.compile or not packs):
        return "auto"
    if requested == "auto" and kernel_problem is not None:
        log(f"Attention uses the model's own implementation, with masks of packed documents: {kernel_problem}.")
        return "auto"
    if requested not in ("auto", "varlen"):
        return requested
    supported = supports_documents(
        model,
        sample_ids=choose_sample_ids(inputs.tokens),
        largest_id=inputs.largest_id,
        vocab_size=embedding_rows(model),
    )
    if not supported and requested == "varlen":
        raise CannotTrain(
            f"attn_implementation is 'varlen', which {type(model).__name__} does not support: its attention needs more "
            "than causal documents.",
            hint="Omit it, or use 'auto'.",
        )
    return "varlen" if supported else "auto"


def attention_problem(request: RunRequest, model: nn.Module) -> str | None:
    """Why this process's GPU can't compute documents with one kernel in the precision of the run; None on CPUs."""
    if not torch.cuda.is_available() or request.options.attn_implementation != "auto":
        return None
    default = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    precision = request.options.mixed_precision or default
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    device = torch.device("cuda", torch.cuda.current_device())
    return find_kernel_problem(device, dtype, head_size(model) or 64)


def decide(
    request: RunRequest,
    inputs: Inputs,
    model: nn.Module,
    isolation: IsolationFinding,
    resume_point: ResumePoint | None,
    accelerate_variables: Mapping[str, str],
    rank: ProcessRank,
    device_kind: str | None,
    attention: str,
    gpu_bytes: int | None = None,
) -> Decision:
    """Decide the complete plan. ``accelerate_variables`` are Accelerate's original variables, which must match it.

    ``attention`` is the implementation that the model uses now; "auto" is its own. ``gpu_bytes`` is the memory of the
    smallest GPU of all ranks.

    Raises `CannotResume` if the checkpoint belongs to a different run, and `InvalidData` if there is nothing to train
    on.
    """
    options = request.options
    num_documents = max(data.num_documents for data in (inputs.tokens, inputs.held_out) if data is not None)
    packs = isolation.isolates is not False or isolation.learns_padding or num_documents <= 1
    plan_inputs = replace(
        _plan_inputs(request, inputs, model, rank),
        device_kind=device_kind,
        packs=packs,
        attn_implementation=attention if attention != "auto" else current_attention(model) or "auto",
    )
    stored = resume_point.plan if resume_point else None
    plan = decide_plan(options, plan_inputs, stored)
    check_launcher(accelerate_variables, plan, cuda=torch.cuda.is_available())
    tokens, held_out, overlap = inputs.tokens, inputs.held_out, Overlap()
    if plan.eval_split:
        split = hold_out(tokens, plan.eval_split, plan.seed)
        tokens, held_out, overlap = split.train, split.held_out, split.overlap
    elif held_out is not None:
        overlap = Overlap(num_trained=num_shared(tokens, held_out))
    is_packing_decided = stored is not None or plan_inputs.from_scratch or isolation.learns_padding
    is_packing_decided |= options.pack is not None or not plan.pack
    candidates = {plan.pack: _make_sequences(tokens, plan, options)}
    if not is_packing_decided and _may_not_pack(candidates[True].sequences, plan_inputs):
        candidates[False] = _make_sequences(tokens, replace(plan, pack=False), options)
    stats = {pack: SequenceStats(len(data.sequences), data.sequences.longest) for pack, data in candidates.items()}
    plan_inputs = replace(plan_inputs, stats_by_packing=stats)
    plan = decide_plan(options, plan_inputs, stored)
    is_split_unset = defaults.batch_split(options) == (None, None)
    if gpu_bytes is not None and is_split_unset and stored is None:
        fitting = _micro_batch_tokens(request, inputs, model, isolation, plan, stats[plan.pack].longest, gpu_bytes)
        plan_inputs = replace(plan_inputs, micro_batch_tokens=fitting)
        plan = decide_plan(options, plan_inputs, stored)
    training_data = candidates[plan.pack]
    held_out_data = None if held_out is None else _make_sequences(held_out, plan, options)
    if not len(training_data.sequences):
        raise nothing_to_train_error(tokens, training_data.sequences)
    plan = with_length(plan, options, len(training_data.sequences))
    check_positions(model, plan.seq_len)
    has_copies = plan.num_shards != rank.world_size  # whose gradients are exchanged even in a trial of a single rank
    # A trial of a single rank would reduce gradients that the run keeps, and need less memory than the run.
    may_split = plan.strategy != "zero" and is_split_unset and not has_copies and not plan.fsdp_keep_gradients
    return Decision(plan_inputs, plan, isolation, training_data, held_out_data, overlap, may_split)


def _plan_inputs(request: RunRequest, inputs: Inputs, model: nn.Module, rank: ProcessRank) -> PlanInputs:
    before_data = plan_inputs_without_data(model, pretrained=inputs.located.pretrained, world_size=rank.world_size)
    data, overlong = inputs.tokens.fingerprint, request.options.overlong
    if overlong == "truncate" and inputs.tokens.whole_D.all():
        overlong = None  # conversations are always truncated
    return replace(
        before_data,
        threads=request.threads or before_data.threads,
        data=data if overlong is None else f"{data} {overlong}",
        eval_data=None if inputs.held_out is None else inputs.held_out.fingerprint,
        base=base_fingerprint(model),
        template_date=inputs.started_on.isoformat(),
        has_adapter=has_adapter(model),
        continued_adapter=inputs.located.continued_settings,
        from_scratch=before_data.from_scratch and not has_adapter(model),
    )


def _micro_batch_tokens(
    request: RunRequest,
    inputs: Inputs,
    model: nn.Module,
    isolation: IsolationFinding,
    plan: Plan,
    length: int,
    gpu_bytes: int,
) -> int | None:
    """The tokens of a micro-batch that fit into the memory of a GPU; None if that can't be estimated."""
    deepspeed = request.options.use_deepspeed
    uses_masks = plan.pack and plan.attn_implementation != "varlen"
    return micro_batch_tokens(
        copying(model, inputs.located),
        plan,
        length,
        gpu_bytes,
        isolation=isolation.isolation if uses_masks else None,
        zero=ZeroSettings.of(zero_config(deepspeed, plan)) if deepspeed else None,
    )


def _may_not_pack(packed: Sequences, plan_inputs: PlanInputs) -> bool:
    """Whether the defaults may decide against packing, so that the unpacked sequences are needed for the decision."""
    return len(packed) < defaults.BATCHES_PER_EPOCH or not fits_on_cpu(plan_inputs, packed.longest)


def _make_sequences(tokens: TokenFile, plan: Plan, options: TrainerOptions) -> DataSplit:
    if plan.method != "sft":
        sequences = preference_sequences(tokens, plan.seq_len, plan.method, overlong=options.overlong)
        return DataSplit(tokens, sequences)
    return DataSplit(tokens, Sequences(tokens, plan.seq_len, pack=plan.pack, overlong=options.overlong))


def choose_sample_ids(tokens: TokenFile) -> list[int]:
    """A few ids of the data for calling the model, at least two of them distinct."""
    ids = [int(token) for token in tokens.ids[:64]]
    distinct = sorted(set(ids))
    other = next((token for token in distinct if token != ids[0]), 0 if ids[0] else 1)
    return (
        [*ids[:6], *[other if token == ids[0] else token for token in ids[:6]]]
        if len(ids) >= 6
        else [ids[0], other] * 3
    )
