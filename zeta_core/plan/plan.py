"""The settings of a run, and the properties of its model, data and machine that they are decided from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from zeta_core.contract.spec.options import (
    Bf16Weights,
    Checkpointing,
    Method,
    Optimizer,
    OptimizerStates,
    Precision,
    Schedule,
)
from zeta_core.optim.schedule import warmup_updates

# What determined the micro-batch: the spec, the run that is resumed, the default global batch (all of it fits), the
# estimated memory, or the memory that ran out.
BatchSizeOrigin = Literal["given", "resumed", "global_batch", "estimated_memory", "exhausted_memory"]


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
    use_activation_checkpointing: Checkpointing
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
    fsdp_keep_gradients: bool = False  # exchange them once per step
    fsdp_cpu_offload: bool = False  # shards are in the memory of the host, where the optimizer updates them
    optimizer_states: OptimizerStates = "float32"
    bf16_weights: Bf16Weights | None = None  # how updates of bfloat16 weights are rounded; None: float32 weights

    @property
    def evaluates(self) -> bool:
        return self.eval_data is not None or bool(self.eval_split)

    @property
    def num_shards(self) -> int:
        """The number of processes that share a copy of the model, if the strategy shards it."""
        return self.fsdp_shards or self.world_size

    @property
    def holds_whole_gradients(self) -> bool:
        """Whether a sharded model accumulates gradients that are not sharded."""
        return self.fsdp_keep_gradients and self.gradient_accumulate_every > 1

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
    # The settings of the adapter that is trained further.
    continued_adapter: Mapping[str, Any] = field(default_factory=dict[str, Any])
    attn_implementation: str = "auto"
    micro_batch_tokens: int | None = None  # that fit into the memory of every GPU, as estimated; None: unknown
    packs: bool = True  # whether the model allows several documents in a sequence by default
    stats_by_packing: Mapping[bool, SequenceStats] = field(default_factory=dict[bool, SequenceStats])
