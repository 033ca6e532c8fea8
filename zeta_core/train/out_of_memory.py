"""Memory that runs out while a model is built or trained, as an error that says what was held and what to change."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import torch
from pydantic import JsonValue

from zeta_core.contract.job.advice import NO_LESS_MEMORY, less_memory
from zeta_core.failures import OutOfMemory, is_out_of_memory
from zeta_core.memory.needs import capacity_of, held, options_of
from zeta_core.parallel.processes import Engine
from zeta_core.plan import Plan


class Trains(Protocol):
    """What computes gradients: the loop over the steps, or the search before the first of them."""

    @property
    def plan(self) -> Plan: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def step(self) -> int:
        """The one that is under way; 0 before the first."""
        ...

    @property
    def doing(self) -> str:
        """Such as "step 3"."""
        ...


class Known:
    """What is known of a run when its memory runs out; told as it comes to be."""

    plan: Plan | None = None
    trains: Trains | None = None


@contextmanager
def explained() -> Generator[Known]:
    """An allocation that fails in here leaves as `OutOfMemory`, with what was held and what to change."""
    known = Known()
    try:
        yield known
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _explanation(error, known) from error


def _explanation(error: Exception, known: Known) -> OutOfMemory:
    plan = known.plan if known.trains is None else known.trains.plan
    evidence: dict[str, JsonValue] = {"error": f"{type(error).__name__}: {error}"[:1000]}
    if plan is None:
        return OutOfMemory("Memory ran out while the model was built.", hint=NO_LESS_MEMORY, evidence=evidence)
    evidence |= options_of(plan)
    evidence["capacity_bytes"] = capacity_of(plan)
    size = f"micro-batches of {plan.batch_size} sequences of {plan.seq_len} tokens"
    if known.trains is None:
        message = f"Memory ran out before the first step, which would have {size}."
        return OutOfMemory(message, hint=NO_LESS_MEMORY, evidence=evidence)
    engine = known.trains.engine
    parts = held(engine.module, engine.optimizer)
    evidence |= {"step": known.trains.step, "memory": parts.as_evidence()}
    if engine.device.type == "cuda":
        evidence["peak_bytes"] = torch.cuda.max_memory_allocated(engine.device)
    cure = less_memory(options_of(plan))
    message = f"Memory ran out in {known.trains.doing} with {size}; beside activations it held {parts}."
    return OutOfMemory(message, hint=cure.hint, patch=cure.patch, evidence=evidence)
