"""The defaults of unset fields, as far as they follow from the spec alone or from the number of sequences.

The server records them in a job's ``resolved_spec`` when it accepts the job, and the Trainer uses the same functions,
so a job and a script with the same fields train alike. A value that stays ``None`` here is decided and recorded when
the model, the data and the device are known. `docs/decisions/0029-defaults-that-learn.md` explains the choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zeta_core.contract.spec.job_spec import JobSpec, TrainerOptions
from zeta_core.contract.spec.options import Dpo, Kto, Orpo
from zeta_core.contract.spec.range_test import FIND
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.sources import BuilderModel, BuiltinSource, ConfigModel, ModelSource, context_limit

MAX_GLOBAL_BATCH = 32  # sequences
BATCHES_PER_EPOCH = 64
SEED = 42
DATASET = BuiltinSource(builtin="python-docs")  # in scripts; over HTTP, a dataset is required
WEIGHT_DECAY = 0.1
EPOCHS = 1.0  # from scratch and preferences
FINE_TUNING_EPOCHS = 3.0
MAX_DEFAULT_SEQ_LEN = 1024  # tokens; longer sequences must be requested, because their memory grows with their length


def batch_split(options: TrainerOptions) -> tuple[int | None, int | None]:
    """``(batch_size, gradient_accumulate_every)`` as far as the options determine them.

    ``batch_size`` alone accumulates nothing. ``gradient_accumulate_every`` alone divides the default global batch.
    """
    if options.batch_size is None:
        return None, options.gradient_accumulate_every
    return options.batch_size, options.gradient_accumulate_every or 1


def split_micro_batch(global_batch: int, accumulate: int, num_processes: int) -> int:
    """The micro-batch of each process that divides a global batch into ``accumulate`` parts; at least 1."""
    return max(1, global_batch // num_processes // accumulate)


def global_batch(num_sequences: int | None, num_processes: int, *, from_scratch: bool) -> int:
    """The default global batch: 32 from scratch, else about 1/64 of the sequences, between 1 and 32.

    An epoch of few sequences then has about 64 steps. It is a multiple of the processes. ``None`` stands for plenty of
    sequences.
    """
    batch = MAX_GLOBAL_BATCH if from_scratch or num_sequences is None else round(num_sequences / BATCHES_PER_EPOCH)
    batch = min(max(batch, 1), MAX_GLOBAL_BATCH)
    if batch > 8:
        batch = 4 * round(batch / 4)  # a number that can be split into equal micro-batches
    return num_processes * math.ceil(batch / num_processes)


def packs(num_packed: int, num_unpacked: int, *, from_scratch: bool) -> bool:
    """Whether documents share sequences by default, given the number of sequences with and without packing.

    Packing makes steps larger and fewer, so fine-tuning on little data does not use it.
    """
    return from_scratch or num_packed >= BATCHES_PER_EPOCH or num_packed >= num_unpacked


def learning_rate(options: TrainerOptions, *, from_scratch: bool, has_adapter: bool = False) -> float | None:
    """From scratch 3e-4, full fine-tuning 2e-5, LoRA 2e-4, DPO and KTO 1e-6, ORPO 8e-6.

    ``None`` if a range test chooses the rate.
    """
    if options.learning_rate is not None:
        return None if options.learning_rate == FIND else options.learning_rate
    if options.method != "sft":
        return 8e-6 if options.method == "orpo" else 1e-6
    if options.lora is not None or has_adapter:
        return 2e-4
    return 3e-4 if from_scratch else 2e-5


def is_from_scratch(model: ModelSource) -> bool:
    """Whether the model starts with random weights; a builder may return a pretrained model nevertheless."""
    return isinstance(model, ConfigModel | BuilderModel)


def epochs(options: TrainerOptions, *, from_scratch: bool) -> float | None:
    """The number of epochs, or ``None`` if ``max_steps`` determines the length."""
    if options.max_steps is not None:
        return None
    if options.epochs is not None:
        return options.epochs
    return EPOCHS if from_scratch or options.method != "sft" else FINE_TUNING_EPOCHS


def seq_len(options: TrainerOptions, limit: int | None) -> int | None:
    """The tokens of a sequence: by default the model's ``limit`` of positions, up to `MAX_DEFAULT_SEQ_LEN`."""
    if options.seq_len is not None:
        return options.seq_len
    return None if limit is None else min(limit, MAX_DEFAULT_SEQ_LEN)


def resolve(spec: JobSpec) -> ResolvedSpec:
    """The spec with every default that follows from it alone; ``global_batch_size`` is in sequences."""
    batch_size, accumulate = batch_split(spec)
    from_scratch = is_from_scratch(spec.model)
    pack = False if spec.method != "sft" else True if from_scratch and spec.pack is None else spec.pack
    processes = spec.resources.num_processes
    default_batch = global_batch(None, processes, from_scratch=True) if from_scratch and processes else None
    if processes and default_batch is not None and batch_size is None and accumulate is not None:
        batch_size = split_micro_batch(default_batch, accumulate, processes)
    global_batch_size = default_batch
    if batch_size and accumulate:
        global_batch_size = batch_size * accumulate * processes if processes else None
    decided = {
        **spec.model_dump(mode="json", exclude={"notify"}),  # only the server uses it
        "batch_size": batch_size,
        "gradient_accumulate_every": accumulate,
        "global_batch_size": global_batch_size,
        "learning_rate": learning_rate(spec, from_scratch=from_scratch),
        "epochs": epochs(spec, from_scratch=from_scratch),
        "seq_len": seq_len(spec, context_limit(spec.model)),
        "pack": pack,
        "seed": SEED if spec.seed is None else spec.seed,
        "weight_decay": WEIGHT_DECAY if spec.weight_decay is None else spec.weight_decay,
        "dpo": (spec.dpo or Dpo()).model_dump() if spec.method == "dpo" else None,
        "kto": (spec.kto or Kto()).model_dump() if spec.method == "kto" else None,
        "orpo": (spec.orpo or Orpo()).model_dump() if spec.method == "orpo" else None,
    }
    return ResolvedSpec.model_validate(decided)


def num_kept_checkpoints(spec: Mapping[str, Any], resolved: ResolvedSpec) -> int:
    """The number of newest checkpoints that a job keeps; older versions may not have recorded it."""
    limit = resolved.save_total_limit or spec.get("save_total_limit")
    return limit if isinstance(limit, int) else int(TrainerOptions.model_fields["save_total_limit"].default)
