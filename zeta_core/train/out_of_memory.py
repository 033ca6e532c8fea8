"""Explaining failed allocations while a model is built or trained: memory use, and settings that need less."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import nn

from zeta_core.contract.job.advice import NO_LESS_MEMORY, suggest_less_memory
from zeta_core.failures import OutOfMemory, is_out_of_memory
from zeta_core.memory.estimate import MemoryByPart
from zeta_core.memory.limits import memory_capacity, memory_options
from zeta_core.memory.usage import device_bytes
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan


class ActiveTraining(Protocol):
    """The part of a run that computes gradients: the training loop, or the range test before it."""

    @property
    def plan(self) -> Plan: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def step(self) -> int:
        """The current step; 0 before the first one."""
        ...

    @property
    def activity(self) -> str:
        """For example, "step 3"."""
        ...


class MemoryContext:
    """The facts about a run that an out-of-memory error reports, set as they become known."""

    plan: Plan | None = None
    training: ActiveTraining | None = None


@contextmanager
def explained_out_of_memory() -> Generator[MemoryContext]:
    """Re-raise allocation failures as `OutOfMemory`, with the memory in use and settings that need less."""
    context = MemoryContext()
    try:
        yield context
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _explanation(error, context) from error


def _explanation(error: Exception, context: MemoryContext) -> OutOfMemory:
    plan = context.plan if context.training is None else context.training.plan
    evidence: dict[str, JsonValue] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    if plan is None:
        return OutOfMemory("Memory ran out while the model was being built.", hint=NO_LESS_MEMORY, evidence=evidence)
    evidence |= memory_options(plan)
    evidence["capacity_bytes"] = memory_capacity(plan)
    size = f"micro-batches of {plan.batch_size} sequences of {plan.seq_len} tokens"
    if context.training is None:
        message = f"Memory ran out before the first step, which needs {size}."
        return OutOfMemory(message, hint=NO_LESS_MEMORY, evidence=evidence)
    engine = context.training.engine
    parts = _memory_in_use(engine.module, engine.optimizer)
    evidence |= {"step": context.training.step, "memory": parts.as_evidence()}
    if engine.device.type == "cuda":
        evidence["peak_bytes"] = torch.cuda.max_memory_allocated(engine.device)
    suggestion = suggest_less_memory(memory_options(plan))
    message = f"Memory ran out in {context.training.activity} with {size}; besides activations, {parts} were in use."
    return OutOfMemory(message, hint=suggestion.hint, patch=suggestion.patch, evidence=evidence)


def _memory_in_use(module: nn.Module, optimizer: torch.optim.Optimizer) -> MemoryByPart:
    """The current memory of each part on the device of this process."""
    parameters = list(module.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    return MemoryByPart(
        weights=device_bytes(parameters),
        gradients=device_bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        optimizer=device_bytes(value for value in state if isinstance(value, torch.Tensor)),
    )
