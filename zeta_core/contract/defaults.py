"""What an unset field means, as far as the words of the spec alone can tell; every other default is the device's.

The server records these in a job's ``resolved_spec`` when it accepts it, and the Trainer uses the same functions, so
that a job and a script with the same fields train alike. A value that stays ``None`` here is decided where the model,
the data and the device are known, and recorded then.
"""

from __future__ import annotations

from typing import Any

from zeta_core.contract.rate_search import FIND
from zeta_core.contract.sources import BuilderModel, ConfigModel, ModelSource, context_limit
from zeta_core.contract.spec import Dpo, JobSpec, TrainerOptions

GLOBAL_BATCH_SEQUENCES = 32
SEED = 42
WEIGHT_DECAY = 0.1
EPOCHS = 1.0
MAX_DEFAULT_SEQ_LEN = 1024  # tokens; longer ones must be asked for, as their memory grows with their length


def batch_split(options: TrainerOptions) -> tuple[int | None, int | None]:
    """``(batch_size, gradient_accumulate_every)``; both ``None`` when only their product is known.

    Both unset is a global batch of `GLOBAL_BATCH_SEQUENCES`, split by the device. ``batch_size`` alone accumulates
    nothing; ``gradient_accumulate_every`` alone divides the default global batch, at least one sequence each time.
    """
    if options.batch_size is None and options.gradient_accumulate_every is None:
        return None, None
    accumulate = options.gradient_accumulate_every or 1
    return options.batch_size or max(1, GLOBAL_BATCH_SEQUENCES // accumulate), accumulate


def learning_rate(options: TrainerOptions, *, from_scratch: bool, has_adapter: bool = False) -> float | None:
    """The learning rate that is used: AdamW from scratch 3e-4, full fine-tuning 2e-5, LoRA 2e-4, DPO 1e-6.

    None where it is to be found.
    """
    if options.learning_rate is not None:
        return None if options.learning_rate == FIND else options.learning_rate
    if options.method == "dpo":
        return 1e-6
    if options.lora is not None or has_adapter:
        return 2e-4
    return 3e-4 if from_scratch else 2e-5


def is_from_scratch(model: ModelSource) -> bool:
    """Whether the model starts with random weights (a builder's does, unless it says otherwise)."""
    return isinstance(model, ConfigModel | BuilderModel)


def epochs(options: TrainerOptions) -> float | None:
    """The epochs that are trained, or ``None`` when ``max_steps`` decides."""
    if options.max_steps is not None:
        return None
    return EPOCHS if options.epochs is None else options.epochs


def seq_len(options: TrainerOptions, limit: int | None) -> int | None:
    """The tokens of a sequence: as asked, else the model's ``limit`` of positions up to `MAX_DEFAULT_SEQ_LEN`."""
    if options.seq_len is not None:
        return options.seq_len
    return None if limit is None else min(limit, MAX_DEFAULT_SEQ_LEN)


def resolve(spec: JobSpec) -> dict[str, Any]:
    """The spec with every default that its words decide; ``global_batch_size`` is in sequences."""
    batch_size, accumulate = batch_split(spec)
    known = None if batch_size is None or accumulate is None else batch_size * accumulate * spec.resources.num_processes
    return {
        **spec.model_dump(mode="json"),
        "batch_size": batch_size,
        "gradient_accumulate_every": accumulate,
        "global_batch_size": known or GLOBAL_BATCH_SEQUENCES,
        "learning_rate": learning_rate(spec, from_scratch=is_from_scratch(spec.model)),
        "epochs": epochs(spec),
        "seq_len": seq_len(spec, context_limit(spec.model)),
        "seed": SEED if spec.seed is None else spec.seed,
        "weight_decay": WEIGHT_DECAY if spec.weight_decay is None else spec.weight_decay,
        "dpo": (spec.dpo or Dpo()).model_dump() if spec.method == "dpo" else None,
    }
