"""Estimating the memory that each process of a run needs, by part.

`minimum_memory` is a lower bound: weights, their gradients, the optimizer's state, and for one micro-batch the input of
the output layer, and the logits of a chunk (`zeta_core.objective.chunked_loss`).
`estimate_run` is exact for weights, gradients and optimizer state, and includes the activations and the buffers of
sharding (`zeta_core.memory.activations`). Temporary buffers of kernels and fragmentation are included in neither.

Sources: weights, gradients and AdamW's two moments take 4 bytes each per trained value, 16 in all (Rajbhandari et al.
2019, ZeRO, arXiv 1910.02054, section 3.1; there in mixed precision, here everything in float32). The stages of ZeRO
shard them over the processes (section 5), and FSDP2 corresponds to the third.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from pydantic import JsonValue
from torch import nn

from zeta_core.contract.job.memory import MemoryEstimate, MemoryParts
from zeta_core.contract.spec.options import Optimizer, OptimizerStates
from zeta_core.environment import free_memory_bytes, total_memory_bytes
from zeta_core.memory.activations import activation_bytes
from zeta_core.memory.usage import num_bytes
from zeta_core.memory.zero_parts import ZeroSettings
from zeta_core.model.activation_checkpointing import repeated_blocks
from zeta_core.model.existing_adapter import without_peft_wrapper
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.preparation import prepare
from zeta_core.objective.chunked_loss import CHUNK_LOGITS
from zeta_core.objective.isolation import Isolation
from zeta_core.optim import eight_bits
from zeta_core.optim.roles import parameter_roles
from zeta_core.plan import Plan

# Builds the model of a plan, with its adapter and its trainable parameters, on the meta device.
PreparedModel = Callable[[Plan], nn.Module]

FLOAT32_BYTES = 4  # per trained weight and per gradient
BF16_BYTES = 2  # with `bf16_weights`
# The minimum number of values in the optimizer's state per trained value. Muon has two for parameters other than
# matrices, and adafactor has factors of the matrices; `optimizer_bytes` counts them from the shapes.
MIN_STATE_VALUES: dict[Optimizer, int] = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}
STATE_BYTES: dict[OptimizerStates, int] = {"float32": 4, "bf16": 2, "8bit": 1}  # per value of the optimizer's state
FSDP_STAGE = 3  # the ZeRO stage that shards everything, as `use_fsdp` does
NOTHING = MemoryParts(weights=0, gradients=0, optimizer=0)
# Per logit, in the backward pass of the loss: its log-softmax and its gradient, both in float32.
LOGIT_BYTES = 8
# Per value of the hidden states that logits are computed from, and of their gradient, in half precision.
HIDDEN_STATE_BYTES = 4


class MemoryByPart(MemoryParts):
    """The size of each part in bytes. The only activations in it are those of the output layer."""

    hidden_states: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.hidden_states + self.logits

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in self._sizes().items() if size)

    def as_evidence(self) -> dict[str, JsonValue]:
        return {**self._sizes()}

    def _sizes(self) -> dict[str, int]:
        return self.model_dump(exclude={"activations"})


def parts_per_process(
    *,
    weights: int,
    num_trained: int,
    optimizer: int,
    stage: int,
    num_processes: int,
    gradient_bytes: int = FLOAT32_BYTES,
) -> MemoryParts:
    """The parts of each process if ``stage`` of ZeRO shards them; stage 0 shards nothing.

    ``weights`` and ``optimizer`` are the bytes of the whole model and of the whole state; ``gradient_bytes`` those of
    the gradient of one weight.
    """
    return MemoryParts(
        weights=weights // (num_processes if stage >= 3 else 1),
        gradients=gradient_bytes * num_trained // (num_processes if stage >= 2 else 1),
        optimizer=optimizer // (num_processes if stage >= 1 else 1),
    )


def shard_bytes(model: nn.Module, plan: Plan) -> MemoryParts:
    """A lower bound of weights, gradients and optimizer state of each process, wherever they are."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return parts_per_process(
        weights=num_bytes(model.parameters()),
        num_trained=trained,
        optimizer=min_state_bytes(plan, trained),
        stage=0 if plan.strategy == "replicated" else FSDP_STAGE,  # the DeepSpeed stage that shards everything
        num_processes=plan.num_shards,
        gradient_bytes=_gradient_bytes(plan),
    )


def min_state_bytes(plan: Plan, num_trained: int) -> int:
    """A lower bound of the whole optimizer state."""
    states = STATE_BYTES[plan.optimizer_states] * MIN_STATE_VALUES[plan.optimizer] * num_trained
    return states + _compensation_bytes(plan, num_trained)


def _compensation_bytes(plan: Plan, num_trained: int) -> int:
    """What rounding removed from weights in bfloat16, if it is kept."""
    return BF16_BYTES * num_trained if plan.bf16_weights == "kahan" else 0


def _gradient_bytes(plan: Plan) -> int:
    """The size of the gradient of one weight, which has its precision."""
    return FLOAT32_BYTES if plan.bf16_weights is None else BF16_BYTES


def optimizer_bytes(model: nn.Module, trained: list[nn.Parameter], plan: Plan) -> int:
    """The size of the whole optimizer state, over all processes: the lower bound, and what the shapes add to it."""
    values = sum(parameter.numel() for parameter in trained)
    minimum = min_state_bytes(plan, values)
    match plan.optimizer:
        case "adamw" if plan.optimizer_states == "8bit":
            moments = 2 * sum(eight_bits.state_bytes(parameter) for parameter in trained)
            return moments + _compensation_bytes(plan, values)
        case "adamw" | "sgd" | "lion":
            return minimum
        case "muon":
            roles = parameter_roles(model, repeated_blocks(model))
            named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            matrices = sum(parameter.numel() for name, parameter in named if roles[name].is_orthogonalized)
            return minimum + FLOAT32_BYTES * (values - matrices)
        case "adafactor":
            factors = sum(
                parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]
                if parameter.dim() >= 2
                else parameter.numel()
                for parameter in trained
            )
            return minimum + FLOAT32_BYTES * factors


def minimum_memory(model: nn.Module, plan: Plan, mean_length: float) -> MemoryByPart:
    """A lower bound for each process. The trainable parameters of ``model`` are set; it is not sharded yet.

    ``mean_length`` is the mean number of tokens per sequence, padding included; some micro-batch has at least this
    many.
    """
    parts = NOTHING if plan.fsdp_cpu_offload else shard_bytes(model, plan)
    half = 2 if plan.strategy == "zero" else 1  # weights and gradients may be in half precision
    rows = min(plan.batch_size, max(1, plan.total_sequences // plan.world_size))
    num_tokens = int(rows * min(mean_length, plan.seq_len))
    vocab_size, width = _output_size(model)
    num_logits = num_tokens * vocab_size
    return MemoryByPart(
        weights=parts.weights // half,
        gradients=parts.gradients // half,
        optimizer=parts.optimizer,
        hidden_states=HIDDEN_STATE_BYTES * num_tokens * width,
        logits=LOGIT_BYTES * (num_logits if plan.strategy == "zero" else min(num_logits, CHUNK_LOGITS)),
    )


def estimate_run(
    build: PreparedModel,
    plan: Plan,
    *,
    on_gpu: bool = False,
    isolation: Isolation | None = None,
    zero: ZeroSettings | None = None,
) -> MemoryEstimate:
    """The memory of each process of a run, without reading weights.

    The activations are unknown (None) if the model can't run on tensors without storage.
    """
    found = estimate_activations(build, plan, on_gpu=on_gpu, isolation=isolation)
    return estimate_memory(build(plan), plan, found if isinstance(found, int) else None, zero=zero)


def estimate_activations(
    build: PreparedModel, plan: Plan, *, on_gpu: bool = False, isolation: Isolation | None = None
) -> int | Exception:
    """The bytes of `activation_bytes` for the model with its adapter, or the error that prevents it."""
    try:
        return activation_bytes(build(plan), plan, on_gpu=on_gpu, isolation=isolation)
    except Exception as error:  # noqa: BLE001 - a model that reads values of tensors may raise anything
        return error


def building(located: LocatedModel) -> PreparedModel:
    """Builds the model from its configuration."""

    def build(plan: Plan) -> nn.Module:
        with torch.device("meta"):
            model = without_peft_wrapper(located.build())
            prepare(model, located, plan)
        return model

    return build


def copying(model: nn.Module, located: LocatedModel) -> PreparedModel:
    """Copies the loaded model without its storage."""

    def build(plan: Plan) -> nn.Module:
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
        copied = copy.deepcopy(model, memo)
        with torch.device("meta"):
            prepare(copied, located, plan)
        return copied

    return build


def estimate_memory(
    model: nn.Module, plan: Plan, activations: int | None, *, zero: ZeroSettings | None
) -> MemoryEstimate:
    """The memory of each process. ``model`` may have no storage. ``zero`` is None if DeepSpeed is not used."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trained, optimizer = sum(parameter.numel() for parameter in trained), optimizer_bytes(model, trained, plan)
    host: int | None = None
    if zero is not None:
        parts = zero.parts(model, num_trained, optimizer, plan)
        activations = None if activations is None else activations + zero.buffer_bytes(model, plan)
    else:
        parts = parts_per_process(
            weights=num_bytes(model.parameters()),
            num_trained=num_trained,
            optimizer=optimizer,
            stage=FSDP_STAGE if plan.strategy == "fsdp2" else 0,
            num_processes=plan.num_shards,
            gradient_bytes=_gradient_bytes(plan),
        )
        if plan.fsdp_cpu_offload:
            host, parts = parts.weights + parts.gradients + parts.optimizer, NOTHING
        if plan.holds_whole_gradients:
            parts = parts.model_copy(update={"gradients": FLOAT32_BYTES * num_trained})
    total = None if activations is None else parts.weights + parts.gradients + parts.optimizer + activations
    return MemoryEstimate(**parts.model_dump(exclude={"activations"}), activations=activations, total=total, host=host)


def has_plenty_of_memory(model: nn.Module, plan: Plan, mean_length: float, values_per_token: int) -> bool:
    """Whether a CPU has twice the roughly estimated memory free, so that a peak a quarter higher does no harm.

    The estimate is `minimum_memory` plus the activations of a micro-batch, which follow from ``values_per_token``.
    """
    activations = FLOAT32_BYTES * plan.batch_size * plan.seq_len * values_per_token
    needed = minimum_memory(model, plan, mean_length).total + activations
    return 2 * needed <= min(free_memory_bytes(), total_memory_bytes()) // plan.world_size


def format_bytes(size: int) -> str:
    """A size for a message, in GiB or MiB."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"


def _output_size(model: nn.Module) -> tuple[int, int]:
    """The number of logits and of hidden values per token if the model names its output layer, otherwise 0."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    weight = getattr(head, "weight", None)  # a linear layer, or peft's wrapper of one
    return (weight.shape[0], weight.shape[1]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else (0, 0)
