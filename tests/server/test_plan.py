"""The plan of the queue: the order of jobs, reservations and backfilling, packing, cached inputs, estimated starts.

The plan is a pure function, so these tests need no database and no clock.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from server.engine.candidate import BACKFILL_MARGIN_SECONDS, Candidate, LiveWorker
from server.engine.load import Load
from server.engine.requirements import Requirements
from server.engine.scheduling.fair_share import updated_mean
from server.engine.scheduling.input_keys import input_keys
from server.engine.scheduling.plan import FleetState, Planner, WaitingJob, make_plan
from server.engine.scheduling.start_times import estimated_starts
from zeta_core.contract.access import NO_LIMITS, ProjectLimits
from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.spec.resources import Resources
from zeta_core.contract.wire.messages import Heartbeat

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = 3600.0
DAY = 24 * HOUR


def worker(
    name: str,
    slots: int,
    *,
    busy: Mapping[int, float | None] | None = None,
    gpus: bool = True,
    cached: Sequence[str] = (),
) -> LiveWorker:
    """A worker; ``busy`` slots have a job that ends after this many seconds, if that is known."""
    busy = busy or {}
    kind = "cuda" if gpus else "cpu"
    reports = [
        DeviceReport(slot=slot, kind=kind, name=kind, memory_bytes=1, device_kind=kind, device=str(slot))
        for slot in range(slots)
    ]
    beat = Heartbeat(
        worker=name,
        incarnation="first",
        beat=1,
        version="0",
        host="here",
        started_at=START,
        cores=slots,
        memory_bytes=1,
        cpu_kind="cpu",
        slots=reports,
        cached_inputs=list(cached),
    )
    seconds_left = {slot: seconds for slot, seconds in busy.items() if seconds is not None}
    free = tuple(slot for slot in range(slots) if slot not in busy)
    return LiveWorker(beat, free, seconds_left=seconds_left)


def job(
    number: int,
    *,
    gpus: int | None = 1,
    nodes: int = 1,
    project: str = "p",
    priority: int = 0,
    limit: float | None = None,
    **fields: Any,
) -> WaitingJob:
    """The job with this number was created after those with smaller numbers; ``limit`` is its time limit."""
    return WaitingJob(
        id=f"job_{number}",
        project=project,
        priority=priority,
        created_at=START + timedelta(seconds=number),
        attempt=0,
        needs=Requirements(Resources(gpus=gpus, nodes=nodes), max_seconds=limit, node_counts=(nodes,)),
        expected_seconds=limit,
        **fields,
    )


def fleet(
    *workers: LiveWorker,
    held: Mapping[str, int] | None = None,
    means: Mapping[str, float] | None = None,
    limits: ProjectLimits = NO_LIMITS,
) -> FleetState:
    load = Load(limits, {})
    for project, num_slots in (held or {}).items():
        load.add(project, num_slots, num_slots)
    return FleetState(workers, load, means or {})


def placed(jobs: Sequence[WaitingJob], state: FleetState) -> list[tuple[str, str]]:
    """The (job, worker) that the plan starts, in its order."""
    placements = make_plan(jobs, state).placements
    return [(job.id, node.candidate.heartbeat.worker) for job, placement in placements for node in placement.nodes]


def starts(jobs: Sequence[WaitingJob], state: FleetState) -> dict[str, float]:
    planner = Planner(state)
    return dict(estimated_starts(planner.plan(jobs), planner))


# --- Priorities and fair share ----------------------------------------------------------------------------------------


def test_a_higher_priority_comes_before_a_smaller_share() -> None:
    jobs = [job(1, project="idle"), job(2, project="busy", priority=1)]
    assert placed(jobs, fleet(worker("w", 1), held={"busy": 5})) == [("job_2", "w")]


def test_projects_with_equal_shares_alternate() -> None:
    jobs = [*(job(number, project="a") for number in range(4)), *(job(number, project="b") for number in range(4, 8))]
    started = [job_id for job_id, _ in placed(jobs, fleet(worker("w", 4)))]
    assert started == ["job_0", "job_4", "job_1", "job_5"]


def test_the_oldest_job_of_a_project_starts_first() -> None:
    jobs = [job(3), job(1), job(2)]
    assert [job_id for job_id, _ in placed(jobs, fleet(worker("w", 2)))] == ["job_1", "job_2"]


def test_after_a_burst_of_one_project_the_others_come_first() -> None:
    """Project a used 8 slots for a day. The next slots go to b, until a's mean has decayed to b's share."""
    mean = updated_mean(0.0, 8, elapsed_seconds=DAY, half_life_seconds=DAY)
    assert mean == 4.0
    jobs = [*(job(number, project="a") for number in range(8)), *(job(number, project="b") for number in range(8, 16))]
    started = [job_id for job_id, _ in placed(jobs, fleet(worker("w", 6), means={"a": mean}))]
    assert started == ["job_8", "job_9", "job_10", "job_11", "job_0", "job_12"]
    later = updated_mean(mean, 0, elapsed_seconds=2 * DAY, half_life_seconds=DAY)
    assert later == 1.0
    assert updated_mean(later, 0, elapsed_seconds=-5, half_life_seconds=DAY) == later, "the clock was set back"


def test_a_reservation_counts_like_held_slots() -> None:
    """So the next reservation goes to another project."""
    jobs = [job(1, gpus=4, project="a"), job(2, gpus=4, project="a"), job(3, gpus=4, project="b")]
    planner = Planner(fleet(worker("x", 4, busy={0: None}), worker("y", 4, busy={0: None})))
    considered = [waiting.id for waiting, _ in planner.plan(jobs).waits]
    assert considered == ["job_1", "job_3", "job_2"]
    assert [candidate.num_reserved for candidate in planner.candidates] == [3, 3]


def test_the_limits_of_a_project_hold_it_back_but_not_the_others() -> None:
    jobs = [job(1, project="a"), job(2, project="a"), job(3, project="b")]
    plan = make_plan(jobs, fleet(worker("w", 4), limits=ProjectLimits(max_running_jobs=1)))
    assert [waiting.id for waiting, _ in plan.placements] == ["job_1", "job_3"]
    assert [(waiting.id, wait.code) for waiting, wait in plan.waits] == [("job_2", "quota")]


# --- Reservations and backfilling -------------------------------------------------------------------------------------


def test_a_large_job_is_not_starved_by_a_stream_of_small_ones() -> None:
    """Each small job ends after an hour and another one arrives, but the large job gets each slot that becomes free."""
    large, left = job(0, gpus=4), {0: 1 * HOUR, 1: 2 * HOUR, 2: 3 * HOUR, 3: 4 * HOUR}
    for hour in range(4):
        busy = {slot: seconds - hour * HOUR for slot, seconds in left.items() if seconds > hour * HOUR}
        small = [job(number) for number in range(1 + 10 * hour, 6 + 10 * hour)]
        assert placed([large, *small], fleet(worker("w", 4, busy=busy))) == [], f"after {hour} hours"
    assert placed([large], fleet(worker("w", 4))) == [("job_0", "w")]


def test_backfilling_never_delays_the_reserved_job() -> None:
    """Only a job whose time limit ends before the reserved job can start may take its slots."""
    large, needed = job(0, gpus=4), 2 * HOUR
    busy: dict[int, float | None] = {0: needed}
    state = fleet(worker("w", 4, busy=busy))
    latest = needed - BACKFILL_MARGIN_SECONDS
    assert placed([large, job(1, limit=latest)], state) == [("job_1", "w")]
    assert placed([large, job(1, limit=latest + 1)], state) == []
    assert placed([large, job(1)], state) == [], "its length is unknown"
    filled = {**busy, 1: latest, 2: latest, 3: latest}
    assert starts([large], state) == starts([large], fleet(worker("w", 4, busy=filled))) == {"job_0": needed}


def test_nothing_is_backfilled_if_the_reserved_job_might_start_at_any_moment() -> None:
    state = fleet(worker("w", 4, busy={0: None, 1: 9 * HOUR}))
    assert placed([job(0, gpus=3), job(1, limit=60)], state) == []


def test_backfilled_jobs_of_several_slots_share_the_reserved_ones() -> None:
    state = fleet(worker("w", 4, busy={0: 9 * HOUR}))
    jobs = [job(0, gpus=4), job(1, gpus=2, limit=HOUR), job(2, limit=HOUR), job(3, limit=HOUR)]
    assert placed(jobs, state) == [("job_1", "w"), ("job_2", "w")]


def test_a_job_on_several_workers_reserves_all_of_them_until_the_last_one_is_free() -> None:
    workers = (worker("x", 2), worker("y", 2, busy={0: 5 * HOUR, 1: HOUR}), worker("z", 2, busy={0: None, 1: None}))
    pair, quick, slow = job(0, gpus=2, nodes=2), job(1, limit=4 * HOUR), job(2, limit=6 * HOUR)
    assert placed([pair, slow, quick], fleet(*workers)) == [("job_1", "x")]
    assert starts([pair], fleet(*workers)) == {"job_0": 5 * HOUR}


def test_a_reservation_is_for_the_worker_where_the_job_can_start_first() -> None:
    soon, late = worker("soon", 4, busy={0: 60.0, 1: 60.0}), worker("late", 4, busy={0: HOUR})
    planner = Planner(fleet(late, soon))
    planner.plan([job(0, gpus=4)])
    assert [(c.heartbeat.worker, c.num_reserved) for c in planner.candidates] == [("late", 0), ("soon", 2)]


# --- Packing and cached inputs ----------------------------------------------------------------------------------------


def test_gpus_of_the_fullest_worker_that_fits_are_used_first() -> None:
    workers = (worker("empty", 8), worker("half", 8, busy=dict.fromkeys(range(4))), worker("full", 1))
    jobs = [job(1), job(2, gpus=3), job(3), job(4, gpus=8)]
    assert placed(jobs, fleet(*workers)) == [
        ("job_1", "full"),
        ("job_2", "half"),
        ("job_3", "half"),
        ("job_4", "empty"),
    ]


def test_a_job_without_gpus_leaves_those_alone() -> None:
    workers = (worker("gpus", 8), worker("plain", 1, gpus=False))
    assert placed([job(1, gpus=0), job(2, gpus=0)], fleet(*workers)) == [("job_1", "plain"), ("job_2", "gpus")]


def test_a_worker_that_holds_the_inputs_is_preferred_to_a_fuller_one() -> None:
    inputs = input_keys("p", "org/model", [{"file": "file_1"}, {"builtin": "python-docs"}])
    model, data = sorted(input_keys("p", "org/model", None)), sorted(inputs)
    assert len(inputs) == 2
    assert input_keys("other", "org/model", None).isdisjoint(inputs)
    workers = (worker("full", 1), worker("model", 8, cached=model), worker("all", 8, cached=data))
    assert placed([job(1, inputs=inputs)], fleet(*workers)) == [("job_1", "all")]
    assert placed([job(1, inputs=inputs)], fleet(*workers[:2])) == [("job_1", "model")]
    assert placed([job(1)], fleet(*workers)) == [("job_1", "full")]


# --- Estimated starts -------------------------------------------------------------------------------------------------


def test_starts_follow_from_the_ends_of_the_jobs_ahead() -> None:
    state = fleet(worker("w", 2, busy={0: HOUR, 1: 3 * HOUR}))
    jobs = [job(0, limit=HOUR), job(1, limit=5 * HOUR), job(2), job(3), job(4)]
    assert starts(jobs, state) == {"job_0": HOUR, "job_1": 2 * HOUR, "job_2": 3 * HOUR, "job_3": 7 * HOUR}


def test_a_start_that_cannot_be_estimated_is_absent() -> None:
    assert starts([job(0)], fleet(worker("w", 1, busy={0: None}))) == {}
    assert starts([job(0), job(1, gpus=4)], fleet(worker("w", 2, busy={0: HOUR, 1: None}))) == {"job_0": HOUR}
    assert starts([job(0, gpus=2), job(1)], fleet(worker("w", 2, busy={1: None}))) == {}
    limited = fleet(worker("w", 2, busy={0: HOUR}), held={"p": 1}, limits=ProjectLimits(max_running_jobs=1))
    assert starts([job(0)], limited) == {}


def test_a_plan_changes_nothing_and_depends_on_nothing_else() -> None:
    state = fleet(worker("w", 4, busy={0: HOUR}), held={"a": 1})
    jobs = [job(0, gpus=4), job(1, limit=60, project="a"), job(2)]
    first, second = make_plan(jobs, state), make_plan(list(reversed(jobs)), state)
    assert [waiting.id for waiting, _ in first.waits] == [waiting.id for waiting, _ in second.waits]
    assert [waiting.id for waiting, _ in first.placements] == [waiting.id for waiting, _ in second.placements]
    assert (dict(state.load.jobs), state.load.held_slots["a"]) == ({"a": 1}, 1)
    assert Candidate.of(state.workers[0]).free == [1, 2, 3]
