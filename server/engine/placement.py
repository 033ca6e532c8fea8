"""Chooses a worker for a job, or explains why the job waits. Uses only heartbeats, not the database.

A job that needs several slots of one worker would wait forever if every free slot went to a smaller job further back in
the queue. So a waiting job of this size reserves the free slots of one worker (`reserve`), in the order of the queue. A
job whose time limit ends before the reserved slots are needed may still use them (`Candidate.usable`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from server.engine.candidate import Candidate, Option, Placement, SlotGroup, Wait
from server.engine.node_placement import choose_nodes, nodes_to_reserve, reservation_order
from server.engine.requirements import Requirements
from zeta_core.contract.job.kind import JobKind
from zeta_core.contract.job.status import WaitingCode
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.wire.messages import GPUS_VERSION, KINDS_VERSION, NODES_VERSION, TIME_LIMIT_VERSION


def choose(
    candidates: Sequence[Candidate], needs: Requirements, inputs: Collection[str] = frozenset()
) -> Placement | Wait:
    """The best worker, or workers, for a job and the slots to use, or the reason why the job waits.

    `Option.rank` defines the best one; ``inputs`` are the keys of the job's model and data. ``resources.exact`` rules
    out every kind other than ``needs.device_kind``.
    """
    if idle := idle_options(candidates, needs):
        return best_option(idle, needs, inputs).placement()
    options = available_options(candidates, needs)
    return options if isinstance(options, Wait) else choose_among(options, candidates, needs, inputs)


def idle_options(candidates: Sequence[Candidate], needs: Requirements) -> list[Option]:
    """The options with enough free slots for a job on one worker, found only among workers with idle slots.

    Most workers of a busy fleet have none, and only the reason for waiting depends on them.
    """
    if max(needs.node_counts) > 1:
        return []
    options = available_options([candidate for candidate in candidates if candidate.has_idle_slot], needs)
    return [] if isinstance(options, Wait) else [option for option in options if option.num_missing <= 0]


def best_option(options: Sequence[Option], needs: Requirements, inputs: Collection[str]) -> Option:
    """The best one of ``options``, which have enough free slots."""
    return max(options, key=lambda option: option.rank(needs.device_kind, inputs))


def choose_among(
    options: Sequence[Option], candidates: Sequence[Candidate], needs: Requirements, inputs: Collection[str]
) -> Placement | Wait:
    """As `choose`; ``options`` are the `available_options`."""
    choices = [_choose_number(candidates, options, needs, inputs, number) for number in needs.node_counts]
    return next((choice for choice in choices if isinstance(choice, Placement)), choices[-1])


def _choose_number(
    candidates: Sequence[Candidate],
    options: Sequence[Option],
    needs: Requirements,
    inputs: Collection[str],
    num_nodes: int,
) -> Placement | Wait:
    """As `choose`, for this number of workers among those that are available and large enough."""
    if num_nodes > 1:
        return choose_nodes(options, needs, inputs, num_nodes)
    fitting = [option for option in options if option.num_missing <= 0]
    if fitting:
        return best_option(fitting, needs, inputs).placement()
    return _wait_for_slots(candidates, options, needs)


def reserve(options: Sequence[Option], needs: Requirements) -> int | None:
    """Reserve slots for a waiting job that needs several; returns the number of free slots that are now held back.

    They are the free slots of the worker, or workers, where the job can start first. Each worker is reserved for one
    job at most. ``None`` means that the job needs only one slot, or that all ``options``, its `available_options`, are
    reserved.
    """
    unreserved = [option for option in options if not option.candidate.is_reserved]
    if min(needs.node_counts) > 1:
        chosen = nodes_to_reserve(unreserved, min(needs.node_counts))
    else:
        wide = [option for option in unreserved if option.group.needed > 1]
        chosen = sorted(wide, key=reservation_order)[:1]
    # All workers of the job are needed at the same time, which is known only if it is known for each of them.
    seconds = [option.seconds_to_backfill for option in chosen]
    known = [number for number in seconds if number is not None]
    for option in chosen:
        option.candidate.reserve(option.free[: option.group.needed], max(known) if known == seconds else None)
    return sum(option.candidate.num_reserved for option in chosen) if chosen else None


def available_options(candidates: Sequence[Candidate], needs: Requirements) -> list[Option] | Wait:
    """The workers on which the job could start now or later, or the reason why there is none."""
    resources, device_kind = needs.resources, needs.device_kind
    if not candidates:
        return Wait(WaitingCode.NO_WORKER)
    # The preparation of a job on several workers doesn't count for its time limit.
    max_seconds = needs.max_seconds if max(needs.node_counts) == 1 else None
    suitable = [
        Option(candidate, group, max_seconds) for candidate in candidates for group in _groups(candidate, needs)
    ]
    options = [option for option in suitable if option.group.is_large_enough]
    if not options:
        return _no_background_slot(candidates) if needs.is_background else _never_fits(candidates, suitable, resources)
    options = [option for option in options if option.candidate.heartbeat.cores >= needs.threads]
    if not options:
        message = (
            f"The job started with {needs.threads} threads, which its exact results depend on, and no connected worker "
            "has that many cores; connect one that does."
        )
        return Wait(WaitingCode.NEVER_FITS, (("threads", needs.threads),), message)
    options = [
        option for option in options if option.candidate.heartbeat.contract_version >= _min_version(option, needs)
    ]
    if not options:
        return Wait(WaitingCode.WORKER_TOO_OLD)
    if resources.exact:
        exact = [option for option in options if _is_exact(option, device_kind)]
        if not exact:
            return _no_worker_of_kind(options, device_kind)
        options = exact
    available = [option for option in options if option.candidate.unavailable is None]
    unavailable = [option.candidate.unavailable for option in options if option.candidate.unavailable is not None]
    if not available:
        return unavailable[0]
    num_available = len({option.worker for option in available})
    if num_available < min(needs.node_counts) <= len({option.worker for option in options}):
        return _too_few_available(unavailable[0], needs, num_available)
    return available


def _groups(candidate: Candidate, needs: Requirements) -> list[SlotGroup]:
    return [candidate.background_group()] if needs.is_background else candidate.groups(needs.resources)


def _min_version(option: Option, needs: Requirements) -> int:
    """The oldest contract version of a worker that can run the job."""
    version = TIME_LIMIT_VERSION if needs.max_seconds is not None else 0
    version = max(version, KINDS_VERSION if needs.kind is not JobKind.TRAINING else 0)
    version = max(version, NODES_VERSION if max(needs.node_counts) > 1 else 0)
    return max(version, GPUS_VERSION if option.group.gpus > 1 else 0)


def _has_kind(group: SlotGroup, device_kind: str | None) -> bool:
    return device_kind is not None and group.device_kind == device_kind


def _is_exact(option: Option, device_kind: str | None) -> bool:
    """Whether a job with ``resources.exact`` may run there. Its first attempt may, if the worker reports its kinds."""
    return option.candidate.reports_kinds() if device_kind is None else _has_kind(option.group, device_kind)


# --- Why a job waits --------------------------------------------------------------------------------------------------


def _wait_for_slots(candidates: Sequence[Candidate], options: Sequence[Option], needs: Requirements) -> Wait:
    """The reason if all suitable workers lack free slots now."""
    if needs.resources.exact and needs.device_kind is not None and any(candidate.free for candidate in candidates):
        return _wait_for_kind(WaitingCode.RESOURCES, needs.device_kind, "all such workers are busy")
    best = min(options, key=lambda option: option.num_missing)
    problems = {
        f"{option.candidate.heartbeat.worker}/{device}": problem
        for option in options
        for device, problem in option.group.problems.items()
    }
    if not best.free and not problems:
        return _all_busy(options)
    needed, unit = best.group.needed, _unit(best.group)
    worker, num_free = best.candidate.heartbeat.worker, len(best.free)
    message = (
        f"The job needs {_count(needed, f'free {unit}')} on one worker, and at most {num_free} "
        f"{'is' if num_free == 1 else 'are'} free now (on {worker!r}); it starts when more are free."
    )
    if problems:
        message += " Not assigned: " + " ".join(f"{device}: {problem}" for device, problem in problems.items())
    details = ((f"{unit}s".lower(), needed), ("free", num_free), ("worker", worker))
    return Wait(WaitingCode.RESOURCES, details, message)


def _all_busy(options: Sequence[Option]) -> Wait:
    num_reserved = sum(option.candidate.num_reserved for option in options)
    if not num_reserved:
        return Wait(WaitingCode.WORKERS_BUSY)
    message = (
        f"{_count(num_reserved, 'free slot')} {'is' if num_reserved == 1 else 'are'} reserved for jobs ahead in the "
        "queue that need several slots of one worker; all others are in use. The job starts when more are free."
    )
    return Wait(WaitingCode.WORKERS_BUSY, (("reserved", num_reserved),), message)


def _too_few_available(first: Wait, needs: Requirements, num_available: int) -> Wait:
    """The reason if enough workers are connected, but not all of them accept jobs; ``first`` is that of one of them."""
    message = (
        f"The job needs {min(needs.node_counts)} workers, and {num_available} of those that could run it "
        f"{'accepts' if num_available == 1 else 'accept'} jobs; the others are being drained or have a full disk."
    )
    return Wait(first.code, first.details, message)


def _no_background_slot(candidates: Sequence[Candidate]) -> Wait:
    """The reason if no connected worker has background slots."""
    if all(candidate.heartbeat.contract_version < KINDS_VERSION for candidate in candidates):
        return Wait(WaitingCode.WORKER_TOO_OLD)
    message = "No connected worker has a background slot; set ZETA_BACKGROUND_SLOTS to at least 1 on one of them."
    return Wait(WaitingCode.NEVER_FITS, (), message)


def _never_fits(candidates: Sequence[Candidate], suitable: Sequence[Option], resources: Resources) -> Wait:
    """The reason if no connected worker has enough suitable slots, with the number on the largest one."""
    if not any(candidate.has_labels(resources) for candidate in candidates):
        labels = ", ".join(f"{name}={value}" for name, value in resources.labels.items())
        message = f"No connected worker has the labels {labels}; connect one, or change resources.labels."
        return Wait(WaitingCode.NEVER_FITS, (("labels", labels),), message)
    needed = resources.gpus if isinstance(resources.gpus, int) else resources.processes or 1
    kind = [] if resources.gpu_model is None else [f"of the model {resources.gpu_model!r}"]
    if resources.min_gpu_memory is not None:
        kind.append(f"with at least {resources.min_gpu_memory.human_readable(decimal=True)} of memory")
    request = f"The job needs {' '.join([_count(needed, 'GPU'), *kind])} on one worker"
    best = max(suitable, key=lambda option: len(option.group.slots), default=None)
    if best is None:
        details = (("gpus", resources.gpus), ("largest", 0))
        message = f"{request}, and no connected worker has such a GPU; connect one that does."
        return Wait(WaitingCode.NEVER_FITS, details, message)
    largest, worker = len(best.group.slots), best.candidate.heartbeat.worker
    message = (
        f"{request}, and the largest connected worker, {worker!r}, has {largest}; request at most {largest}, or "
        "connect a larger worker."
    )
    return Wait(WaitingCode.NEVER_FITS, (("gpus", resources.gpus), ("largest", largest)), message)


def _no_worker_of_kind(options: Sequence[Option], device_kind: str | None) -> Wait:
    if device_kind is None or not any(option.candidate.reports_kinds() for option in options):
        return Wait(WaitingCode.WORKER_TOO_OLD)
    return _wait_for_kind(WaitingCode.NEVER_FITS, device_kind, "no connected worker has this kind")


def _wait_for_kind(code: WaitingCode, device_kind: str, reason: str) -> Wait:
    message = (
        f"Waiting for a worker with device kind {device_kind} (resources.exact is true): {reason}. "
        "To continue on another kind, rerun the job from its newest checkpoint with resources.exact=false."
    )
    return Wait(code, (("device_kind", device_kind),), message)


def _unit(group: SlotGroup) -> str:
    return "GPU" if group.gpus else "slot"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
