"""Successive halving on the database: which jobs of a sweep pause, continue and are eliminated, in any order of events.

Each pass uses a new `SweepHalving`, as after a restart of the server.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from server.database.tables import JobRow, SweepRow
from server.engine.apply_journal import apply_batch
from server.engine.event_signal import EventSignal
from server.engine.halving import SweepHalving
from tests.harness.fleet import SmallFleet, small_fleet
from tests.harness.simulated_worker import progress, status
from tests.server.server_process import SPEC, error_of
from tests.server.test_attempt_endings import lose_worker_of, request, start
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import JournalBatch


@pytest.fixture
def fleet(tmp_path: Path, database_url: str | None) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0", database_url) as fleet:
        yield fleet


class SimulatedSweep:
    """A sweep whose jobs' journals the test writes. The first comparison is at step 10, then at step 20, 40, …"""

    def __init__(self, fleet: SmallFleet, num_jobs: int) -> None:
        self.fleet = fleet
        self.id = new_id("sweep")
        self.jobs = [fleet.submit() for _ in range(num_jobs)]
        self._num_lines: Counter[tuple[str, int]] = Counter()
        fleet.loop.run(self._store())

    async def _store(self) -> None:
        halving = {"grid": {"seed": list(range(len(self.jobs)))}, "halving": {"steps": 10}}
        async with self.fleet.database.write() as session:
            session.add(
                SweepRow(
                    id=self.id, project="default", created_by="key_test", created_at=utc_now(), request=halving,
                    next_comparison=0,
                )
            )  # fmt: skip
            await session.execute(update(JobRow).where(JobRow.id.in_(self.jobs)).values(sweep=self.id))

    def report(self, job_id: str, *lines: dict[str, Any]) -> None:
        """Store the next lines of the journal of the running attempt."""
        attempt = self.fleet.job(job_id).attempt
        first = self._num_lines[job_id, attempt] + 1
        self._num_lines[job_id, attempt] += len(lines)

        async def write() -> None:
            async with self.fleet.database.write() as session:
                batch = JournalBatch(job_id=job_id, attempt=attempt, worker="w", first_line=first, lines=list(lines))
                await apply_batch(session, batch)

        self.fleet.loop.run(write())

    def train(self, job_id: str, *, to: int, loss: float, **fields: Any) -> None:
        """Start the job if it is queued, and report a step."""
        if self.fleet.job(job_id).status == JobStatus.QUEUED:
            start(self.fleet, job_id)
        self.report(job_id, progress(to, total_steps=1000, loss=loss, **fields))

    def stop(self, job_id: str) -> None:
        """The run stops as requested, and reports that it has paused."""
        self.report(job_id, status("paused", reason="paused_by_user"))

    def one_pass(self) -> None:
        halving = SweepHalving(self.fleet.database, EventSignal(), lambda: None)
        self.fleet.loop.run(halving.one_pass())

    def states(self) -> list[tuple[str, str | None]]:
        return [(job.status, job.status_reason) for job in map(self.fleet.job, self.jobs)]

    def next_comparison(self) -> int | None:
        async def read() -> int | None:
            async with self.fleet.database.read() as session:
                return (await session.get_one(SweepRow, self.id)).next_comparison

        return self.fleet.loop.run(read())


WAITS = ("paused", "waits_for_sweep")
ELIMINATED = ("cancelled", "eliminated")
CONTINUES = ("queued", "resumed")


def test_the_better_half_continues_after_all_jobs_have_reached_the_step(fleet: SmallFleet) -> None:
    sweep = SimulatedSweep(fleet, 4)
    for number, (job_id, loss) in enumerate(zip(sweep.jobs, (2.0, 3.0, 1.0, 4.0), strict=True)):
        sweep.train(job_id, to=8, loss=3.5)
        sweep.one_pass()
        assert fleet.job(job_id).requested_action is None, "it has not reached the step"
        single = [{"step": 9, "loss": 3.5}, {"step": 10, "loss": loss}, {"step": 11, "loss": 99 - 20 * loss}]
        sweep.train(job_id, to=11, loss=50 - 10 * loss, steps=single)  # the step after the comparison doesn't count
        sweep.one_pass()
        assert fleet.job(job_id).requested_action == "wait_for_sweep"
        sweep.stop(job_id)
        assert sweep.states()[number] == WAITS
        assert (fleet.job(job_id).waiting_reason or {})["code"] == "sweep"
    assert sweep.states() == [WAITS] * 4
    sweep.one_pass()
    assert sweep.states() == [CONTINUES, ELIMINATED, CONTINUES, ELIMINATED]
    assert sweep.next_comparison() == 1
    message = fleet.events(sweep.jobs[1])[-1].fields["message"]
    assert message == "Ranked 3 of 4 in its sweep at step 10 (loss 3.3333); the best 2 continue."

    for job_id, loss in ((sweep.jobs[0], 0.5), (sweep.jobs[2], 5.5)):
        sweep.train(job_id, to=20, loss=loss)
        sweep.one_pass()
        sweep.stop(job_id)
    sweep.one_pass()
    assert sweep.states() == [CONTINUES, ELIMINATED, ELIMINATED, ELIMINATED]
    assert sweep.next_comparison() is None
    sweep.train(sweep.jobs[0], to=40, loss=1.0)
    sweep.one_pass()
    assert fleet.job(sweep.jobs[0]).requested_action is None, "the last job is not compared again"


def test_held_out_losses_decide_if_every_job_has_one(fleet: SmallFleet) -> None:
    sweep = SimulatedSweep(fleet, 2)
    for job_id, loss, eval_loss in ((sweep.jobs[0], 1.0, 3.0), (sweep.jobs[1], 2.0, 2.5)):
        sweep.train(job_id, to=5, loss=9.0, eval_loss=eval_loss)
        sweep.train(job_id, to=10, loss=loss)
        sweep.train(job_id, to=15, loss=loss, eval_loss=9.0 - eval_loss)  # after the step
        sweep.one_pass()
        sweep.stop(job_id)
    sweep.one_pass()
    assert sweep.states() == [ELIMINATED, CONTINUES]
    assert "eval_loss 2.5000" in fleet.events(sweep.jobs[1])[-1].fields["message"]


def test_ended_jobs_delay_nothing_and_completed_ones_are_compared(fleet: SmallFleet) -> None:
    sweep = SimulatedSweep(fleet, 4)
    failed, completed, slow, waiting = sweep.jobs
    start(fleet, failed)
    sweep.report(failed, status("failed", reason="invalid_data", message="It is empty."))
    sweep.train(completed, to=12, loss=1.0)
    sweep.report(completed, status("succeeded"))
    sweep.train(waiting, to=10, loss=3.0)
    sweep.one_pass()
    sweep.stop(waiting)
    sweep.one_pass()
    assert sweep.states()[3] == WAITS, "one job has not reached the step"
    sweep.train(slow, to=10, loss=2.0)
    sweep.one_pass()
    sweep.stop(slow)
    sweep.one_pass()
    assert sweep.states()[1:] == [("succeeded", "completed"), CONTINUES, ELIMINATED]


def test_a_failure_or_a_lost_worker_keeps_the_pending_pause(fleet: SmallFleet) -> None:
    sweep = SimulatedSweep(fleet, 2)
    crashed, lost = sweep.jobs
    sweep.train(crashed, to=10, loss=1.0)
    sweep.one_pass()
    sweep.report(crashed, status("failed", reason="process_killed", message="killed"))
    assert sweep.states()[0] == WAITS
    lose_worker_of(fleet, lost)
    assert sweep.states()[1] == ("queued", "retrying"), "nothing was requested yet"
    sweep.train(lost, to=10, loss=2.0)
    sweep.one_pass()
    sweep.stop(lost)
    sweep.one_pass()
    assert sweep.states() == [CONTINUES, ELIMINATED]


def test_the_request_of_a_user_replaces_the_pause_of_the_sweep(fleet: SmallFleet) -> None:
    sweep = SimulatedSweep(fleet, 2)
    for job_id in sweep.jobs:
        sweep.train(job_id, to=10, loss=1.0)
    sweep.one_pass()
    request(fleet, sweep.jobs[0], "pause")
    sweep.stop(sweep.jobs[0])
    sweep.stop(sweep.jobs[1])
    sweep.one_pass()
    assert sweep.states() == [("paused", "paused_by_user"), WAITS], "the comparison waits for the user"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"halving": {"steps": 0}}, "halving.steps"),
        ({"halving": {"steps": 5, "factor": 1}}, "halving.factor"),
        ({"halving": {"steps": 5, "eta": 3}}, "halving.eta"),
        ({"halving": {"steps": 5}, "grid": {"seed": [1]}}, "halving"),
        ({"halving": {"steps": 5}, "random": 1}, "halving"),
        ({"halving": {"steps": 50}, "grid": {"max_steps": [10, 50]}}, "halving.steps"),
    ],
)
def test_invalid_halving_is_rejected(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = http.post("/v1/sweeps", json={"spec": SPEC, "grid": {"seed": [1, 2, 3]}, **fields})
    assert (response.status_code, error_of(response)["param"]) == (422, param), response.text


def test_a_sweep_shows_when_its_jobs_are_compared(http: httpx.Client) -> None:
    body = {"spec": {**SPEC, "max_steps": 100}, "grid": {"seed": [1, 2]}, "halving": {"steps": 10, "factor": 3}}
    sweep = http.post("/v1/sweeps", json=body).json()
    assert (sweep["halving"], sweep["next_comparison_step"]) == ({"steps": 10, "factor": 3}, 10)
    http.post(f"/v1/sweeps/{sweep['id']}/cancel")
    plain = http.post("/v1/sweeps", json={"spec": SPEC, "grid": {"seed": [1, 2]}}).json()
    assert (plain["halving"], plain["next_comparison_step"]) == (None, None)
