"""Chooses the workers of a job that needs several nodes, or explains why it waits.

Every node is a worker of its own with the same number of slots of the same device kind. While too few workers have
enough free slots, the job reserves free slots of as many workers as it needs (`nodes_to_reserve`), so that smaller jobs
further back in the queue don't take each slot as soon as it is free.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from server.engine.candidate import Option, Placement, Wait
from server.engine.requirements import Requirements
from zeta_core.contract.job.status import WaitingCode


def choose_nodes(
    options: Sequence[Option], needs: Requirements, inputs: Collection[str], num_nodes: int
) -> Placement | Wait:
    """This number of workers by node rank, or the reason why the job waits.

    ``options`` are available workers that are large enough, some of them with several kinds of GPU. `Option.rank`
    defines the best ones; ``inputs`` are the keys of the job's model and data.
    """

    def rank(option: Option) -> tuple[float, ...]:
        return option.rank(needs.device_kind, inputs)

    complete: list[list[Option]] = []
    for kind in _by_kind(options):
        fitting = [option for option in kind if option.num_missing <= 0]
        if len(fitting) >= num_nodes:
            complete.append(sorted(fitting, key=rank, reverse=True)[:num_nodes])
    if not complete:
        return _wait(options, num_nodes)
    chosen = max(complete, key=lambda nodes: min(map(rank, nodes)))
    first, *others = sorted(chosen, key=lambda option: option.worker)
    return first.placement(tuple(option.placement() for option in others))


def nodes_to_reserve(options: Sequence[Option], num_nodes: int) -> list[Option]:
    """The workers to reserve for a waiting job: those of one kind that are the first ones with enough free slots.

    ``options`` aren't reserved yet.
    """
    kinds = [sorted(kind, key=reservation_order)[:num_nodes] for kind in _by_kind(options)]
    complete = [nodes for nodes in kinds if len(nodes) == num_nodes]
    return min(complete, key=lambda nodes: (reservation_order(nodes[-1])[0], _num_missing(nodes)), default=[])


def reservation_order(option: Option) -> tuple[float, int, str]:
    """Orders workers by the time when they will have enough free slots, then by the number of missing ones."""
    seconds = option.seconds_until_free
    return float("inf") if seconds is None else seconds, max(0, option.num_missing), option.worker


def _by_kind(options: Sequence[Option]) -> list[list[Option]]:
    """The workers of each device kind, each with its group of this kind that has the most free slots."""
    kinds: dict[tuple[str | None, int], dict[str, Option]] = {}
    for option in options:
        workers = kinds.setdefault((option.group.device_kind, option.group.gpus), {})
        other = workers.get(option.worker)
        if other is None or option.num_missing < other.num_missing:
            workers[option.worker] = option
    return [list(workers.values()) for workers in kinds.values()]


def _num_missing(nodes: Sequence[Option]) -> int:
    return sum(max(0, node.num_missing) for node in nodes)


def _wait(options: Sequence[Option], num_nodes: int) -> Wait:
    """The reason if fewer workers than this number are ready."""
    best = max(_by_kind(options), key=lambda kind: (len(kind) >= num_nodes, _num_ready(kind), len(kind)))
    needed, unit = best[0].group.needed, "GPU" if best[0].group.gpus else "slot"
    units = unit if needed == 1 else f"{unit}s"
    if len(best) < num_nodes:
        message = (
            f"The job needs {num_nodes} workers with {needed} {units} of the same kind each, and {len(best)} of "
            f"{num_nodes} such workers accept jobs; connect more workers, or request fewer nodes."
        )
        return Wait(WaitingCode.NEVER_FITS, (("nodes", num_nodes), ("connected", len(best))), message)
    num_ready = _num_ready(best)
    missing = ", ".join(f"{option.worker} ({len(option.free)} free)" for option in best if option.num_missing > 0)
    ready = f"{num_ready} of {num_nodes} workers {'has' if num_ready == 1 else 'have'} {needed} free {units}"
    message = f"{ready}; the job starts when more are free. Busy: {missing}."
    return Wait(WaitingCode.RESOURCES, (("nodes", num_nodes), ("ready", num_ready)), message)


def _num_ready(kind: Sequence[Option]) -> int:
    return sum(option.num_missing <= 0 for option in kind)
