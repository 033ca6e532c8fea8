"""One fault at a time, of servers, the database and Redis. (tests/worker covers the faults of workers.)

The fleet has two real servers on one PostgreSQL, one host, and short time limits. Each test ends with a check of every
promise.
"""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tests.chaos.databases import PostgresDatabase
from tests.chaos.faults import Injection, another_program_on_redis_port, invalid_redis_entries
from tests.chaos.fleet import Fleet, running_fleet
from tests.chaos.planned_jobs import PlannedJob, spec_of
from tests.chaos.promises import PROMISES, Evidence
from tests.chaos.users import Users
from tests.harness.postgres import PostgresServer
from tests.harness.waiting import wait_until
from tests.server.server_process import error_of
from zeta_core.contract.job.status import ENDED, JobStatus

PACE = 0.05  # seconds per step
pytestmark = pytest.mark.timeout(400)


class Scenario:
    """The fleet and its users, who submit one job at a time."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.users = Users(fleet.servers)

    def submit(self, *, steps: int = 60) -> str:
        planned = PlannedJob(
            f"job-{len(self.users.accepted)}", "small", spec_of("small", "", steps=steps, seconds_per_step=PACE)
        )
        job_id = wait_until(lambda: self.users.submit(planned), 60, "a 201")
        assert job_id is not None
        return job_id

    def wait_for_step(self, job_id: str, step: int, timeout_seconds: float = 90) -> None:
        """Wait until the step is stored."""
        try:
            wait_until(
                lambda: (self.fleet.database.job_states()[job_id].last_step or 0) >= step,
                timeout_seconds,
                f"{job_id} to reach step {step}",
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.fleet.logs()}") from None

    def check_promises(self, job_id: str, timeout_seconds: float = 120) -> list[str | None]:
        """Wait until every job has ended, check every promise, and return the end reasons of this job's attempts."""
        try:
            wait_until(
                lambda: all(job.status in ENDED for job in self.fleet.database.job_states().values()),
                timeout_seconds,
                "every job to end",
            )
            wait_until(lambda: not self.fleet.training_processes(), 60, "all runs to end")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.fleet.logs()}") from None
        evidence = Evidence(self.fleet, self.users)
        for promise in PROMISES:
            breaches = list(promise.breaches(evidence))
            assert not breaches, f"{promise.sentence}: {breaches}\n{self.fleet.logs()}"
        return [attempt.reason for attempt in evidence.attempts[job_id]]


@pytest.fixture(scope="module")
def scenario(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    with postgres_server.fresh_database() as url:
        database = PostgresDatabase(postgres_server, url)
        with running_fleet(tmp_path_factory.mktemp("fleet"), database, num_hosts=1) as fleet:
            yield Scenario(fleet)
        database.close()


@pytest.mark.extended
def test_a_run_continues_when_one_server_and_then_both_are_killed(scenario: Scenario) -> None:
    job_id = scenario.submit(steps=100)
    scenario.wait_for_step(job_id, 3)
    first, second = scenario.fleet.servers
    first.end(signal.SIGKILL)
    stored = scenario.fleet.database.job_states()[job_id].last_step or 0
    scenario.wait_for_step(job_id, stored + 10)
    second.end(signal.SIGKILL)
    first.start()
    second.start()
    assert scenario.check_promises(job_id) == ["completed"]


@pytest.mark.extended
def test_a_stopped_server_exits_with_0_and_disturbs_no_attempt(scenario: Scenario) -> None:
    job_id = scenario.submit()
    scenario.wait_for_step(job_id, 3)
    for server in scenario.fleet.servers:
        assert server.end(signal.SIGTERM) == 0, server.log()
    for server in scenario.fleet.servers:
        server.start()
    assert scenario.check_promises(job_id) == ["completed"]


@pytest.mark.extended
def test_two_servers_create_and_start_each_job_once(scenario: Scenario) -> None:
    planned = PlannedJob("twice", "small", spec_of("small", "", steps=20))
    headers = {"Idempotency-Key": planned.key}
    with ThreadPoolExecutor(2) as pool:
        requests = [
            pool.submit(scenario.users.request, "POST", "/v1/jobs", json=planned.spec, headers=headers)
            for _ in range(2)
        ]
    responses = [response for request in requests if (response := request.result()) is not None]
    assert [response.status_code for response in responses] == [201, 201]
    (job_id,) = {response.json()["id"] for response in responses}
    scenario.users.accepted[job_id] = planned
    others = [scenario.submit(steps=20) for _ in range(5)]
    assert [scenario.check_promises(other_id) for other_id in (job_id, *others)] == [["completed"]] * 6


@pytest.mark.extended
def test_jobs_continue_while_another_program_locks_the_database(scenario: Scenario) -> None:
    job_id = scenario.submit(steps=100)
    scenario.wait_for_step(job_id, 3)
    server = scenario.fleet.servers[0]
    with scenario.fleet.database.locked(), server.http() as http:
        wait_until(lambda: len(_journal(scenario, job_id)) > 40, 60, "the run to continue")
        assert http.get("/healthz").status_code == 200
    assert scenario.check_promises(job_id) == ["completed"]


@pytest.mark.extended
def test_a_database_outage_is_reported_and_costs_no_attempt(scenario: Scenario) -> None:
    database = scenario.fleet.database
    assert isinstance(database, PostgresDatabase)
    job_id = scenario.submit(steps=100)
    scenario.wait_for_step(job_id, 3)
    database.crash()
    with scenario.fleet.servers[0].http() as http:
        response = http.post("/v1/jobs", json=spec_of("small", ""))
        assert (response.status_code, error_of(response)["code"]) == (503, "database_unavailable")
        assert http.get("/healthz").status_code == 200
    wait_until(lambda: len(_journal(scenario, job_id)) > 40, 60, "the run to continue")
    database.start_again()
    assert scenario.check_promises(job_id) == ["completed"]


@pytest.mark.extended
@pytest.mark.parametrize("keeps_its_data", [True, False])
def test_jobs_survive_a_killed_redis_with_or_without_its_data(scenario: Scenario, *, keeps_its_data: bool) -> None:
    job_id = scenario.submit(steps=100)
    scenario.wait_for_step(job_id, 3)
    scenario.fleet.valkey.kill()
    waiting = scenario.submit(steps=10)  # accepted without Redis
    if not keeps_its_data:
        scenario.fleet.valkey.delete_data()
    scenario.fleet.valkey.start()
    assert scenario.check_promises(job_id) == ["completed"]
    assert scenario.check_promises(waiting) == ["completed"]


@pytest.mark.extended
@pytest.mark.parametrize("fault", [another_program_on_redis_port, invalid_redis_entries])
def test_invalid_data_from_redis_costs_no_attempt_and_stops_no_loop(
    scenario: Scenario, fault: Callable[[Fleet, Random], Injection]
) -> None:
    job_id = scenario.submit(steps=100)
    scenario.wait_for_step(job_id, 3)
    for _ in fault(scenario.fleet, Random(7)):
        wait_until(lambda: len(_journal(scenario, job_id)) > 40, 60, "the run to continue")
    assert scenario.check_promises(job_id) == ["completed"]


@pytest.mark.extended
def test_flushall_at_any_moment_loses_nothing(scenario: Scenario) -> None:
    with scenario.fleet.valkey.client() as client:
        job_id = scenario.submit()
        client.flushall()  # loses the dispatch or the claim
        for step in (3, 10, 30):
            scenario.wait_for_step(job_id, step)
            client.flushall()
    assert scenario.check_promises(job_id) == ["completed"]


@pytest.mark.slow
def test_a_long_redis_outage_costs_an_attempt_but_no_step(scenario: Scenario) -> None:
    job_id = scenario.submit(steps=1000)
    scenario.wait_for_step(job_id, 3)
    scenario.fleet.valkey.stop()
    wait_until(lambda: not scenario.fleet.training_processes(), 60, "the run to save and exit")
    assert len(_journal(scenario, job_id)) > 40, "it continued for some time"
    scenario.fleet.valkey.start()
    wait_until(lambda: _first_step(scenario, job_id, 2), 60, "a step of the next attempt")
    (first, second) = scenario.fleet.database.attempts(job_id)
    assert second.first_step == (first.last_step or 0) + 1
    scenario.users.accepted_commands[job_id] = ["cancel"]
    assert scenario.users.request("POST", f"/v1/jobs/{job_id}/cancel") is not None
    scenario.check_promises(job_id)


@pytest.mark.slow
def test_commands_to_adopted_runs_that_hang_are_enforced(scenario: Scenario) -> None:
    (host,) = scenario.fleet.hosts
    cancelled, handed_back = scenario.submit(steps=100), scenario.submit(steps=100)
    for job_id in (cancelled, handed_back):
        scenario.wait_for_step(job_id, 3)
    host.end(signal.SIGKILL)
    for found in host.training_processes():
        found.process.suspend()
    host.start()
    scenario.fleet.command(f"/v1/workers/{host.name}/drain")
    scenario.fleet.cancelled.add(cancelled)
    scenario.fleet.command(f"/v1/jobs/{cancelled}/cancel")
    try:
        wait_until(
            lambda: (
                [scenario.fleet.database.job_states()[job].status for job in (cancelled, handed_back)]
                == [JobStatus.CANCELLED, JobStatus.QUEUED]
            ),
            90,
            "both commands to take effect",
        )
    except AssertionError as error:
        raise AssertionError(f"{error}\n{scenario.fleet.logs()}") from None
    assert not scenario.fleet.training_processes(), "processes of an ended attempt are left"
    scenario.fleet.command(f"/v1/workers/{host.name}/undrain")
    others = [scenario.submit(steps=20) for _ in range(2)]
    assert scenario.check_promises(handed_back) == ["handed_back", "completed"]
    assert [scenario.check_promises(job_id) for job_id in (cancelled, *others)] == [
        ["cancelled_by_user"],
        ["completed"],
        ["completed"],
    ]


def _first_step(scenario: Scenario, job_id: str, attempt: int) -> int | None:
    return next((row.first_step for row in scenario.fleet.database.attempts(job_id) if row.attempt == attempt), None)


def _journal(scenario: Scenario, job_id: str) -> list[str]:
    """The journal lines of the job's current attempt."""
    (directory, *_) = [path for path in scenario.fleet.run_directories() if path.parent.name == job_id][::-1]
    return (directory / "events.jsonl").read_text().splitlines()
