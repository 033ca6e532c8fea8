"""One fault at a time: servers, database, Redis. (Workers, trainings, lines, clocks and disks: tests/worker.)

Two real servers on one PostgreSQL, one host, limits set short. After each test every promise is checked.
"""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tests.chaos.databases import PostgresUnderFire
from tests.chaos.faults import Blow, redis_answers_nonsense, redis_poisoned
from tests.chaos.fleet import Fleet, running_fleet
from tests.chaos.orders import Order, spec_of
from tests.chaos.promises import PROMISES, Evidence
from tests.chaos.users import Users
from tests.harness.postgres import PostgresServer
from tests.harness.waiting import wait_until
from tests.server.serving import error_of
from zeta_core.contract.job.status import ENDED, JobStatus

PACE = 0.05  # seconds per step
pytestmark = pytest.mark.timeout(400)


class Scene:
    """The fleet, and its users, who post one order after the other."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.users = Users(fleet.servers)

    def post(self, *, steps: int = 60) -> str:
        order = Order(
            f"order-{len(self.users.accepted)}", "small", spec_of("small", "", steps=steps, seconds_per_step=PACE)
        )
        job_id = wait_until(lambda: self.users.post(order), 60, "a 201")
        assert job_id is not None
        return job_id

    def wait_for_step(self, job_id: str, step: int, timeout_seconds: float = 90) -> None:
        """Until the step is stored."""
        try:
            wait_until(
                lambda: (self.fleet.database.standings()[job_id].last_step or 0) >= step,
                timeout_seconds,
                f"{job_id} to reach step {step}",
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.fleet.logs()}") from None

    def judge(self, job_id: str, timeout_seconds: float = 120) -> list[str | None]:
        """Wait until every job has ended and check every promise; returns why the attempts of this one ended."""
        try:
            wait_until(
                lambda: all(one.status in ENDED for one in self.fleet.database.standings().values()),
                timeout_seconds,
                "every job to end",
            )
            wait_until(lambda: not self.fleet.trainings(), 60, "nothing to be left")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.fleet.logs()}") from None
        evidence = Evidence(self.fleet, self.users)
        for promise in PROMISES:
            breaches = list(promise.breaches(evidence))
            assert not breaches, f"{promise.sentence}: {breaches}\n{self.fleet.logs()}"
        return [attempt.reason for attempt in evidence.attempts[job_id]]


@pytest.fixture(scope="module")
def scene(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with postgres_server.fresh_database() as url:
        database = PostgresUnderFire(postgres_server, url)
        with running_fleet(tmp_path_factory.mktemp("fleet"), database, num_hosts=1) as fleet:
            yield Scene(fleet)
        database.close()


def test_a_server_is_killed_and_the_other_goes_on_then_both_are_and_the_training_does(scene: Scene) -> None:
    job_id = scene.post(steps=100)
    scene.wait_for_step(job_id, 3)
    first, second = scene.fleet.servers
    first.end(signal.SIGKILL)
    stored = scene.fleet.database.standings()[job_id].last_step or 0
    scene.wait_for_step(job_id, stored + 10)
    second.end(signal.SIGKILL)
    first.start()
    second.start()
    assert scene.judge(job_id) == ["completed"]


def test_a_server_told_to_stop_ends_with_0_and_disturbs_no_attempt(scene: Scene) -> None:
    job_id = scene.post()
    scene.wait_for_step(job_id, 3)
    for server in scene.fleet.servers:
        assert server.end(signal.SIGTERM) == 0, server.log()
    for server in scene.fleet.servers:
        server.start()
    assert scene.judge(job_id) == ["completed"]


def test_two_servers_make_one_job_of_one_order_and_start_each_job_once(scene: Scene) -> None:
    order = Order("twice", "small", spec_of("small", "", steps=20))
    headers = {"Idempotency-Key": order.key}
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(scene.users.ask, "POST", "/v1/jobs", json=order.spec, headers=headers) for _ in range(2)]
    answers = [answer for one in asked if (answer := one.result()) is not None]
    assert [answer.status_code for answer in answers] == [201, 201]
    (job_id,) = {answer.json()["id"] for answer in answers}
    scene.users.accepted[job_id] = order
    others = [scene.post(steps=20) for _ in range(5)]
    assert [scene.judge(one) for one in (job_id, *others)] == [["completed"]] * 6


def test_a_database_that_another_program_locks_is_waited_for(scene: Scene) -> None:
    job_id = scene.post(steps=100)
    scene.wait_for_step(job_id, 3)
    server = scene.fleet.servers[0]
    with scene.fleet.database.locked(), server.http() as http:
        wait_until(lambda: len(_journal(scene, job_id)) > 40, 60, "the training to go on")
        assert http.get("/healthz").status_code == 200
    assert scene.judge(job_id) == ["completed"]


def test_a_database_that_is_down_is_said_to_clients_and_costs_no_attempt(scene: Scene) -> None:
    database = scene.fleet.database
    assert isinstance(database, PostgresUnderFire)
    job_id = scene.post(steps=100)
    scene.wait_for_step(job_id, 3)
    database.crash()
    with scene.fleet.servers[0].http() as http:
        answer = http.post("/v1/jobs", json=spec_of("small", ""))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "database_unavailable")
        assert http.get("/healthz").status_code == 200
    wait_until(lambda: len(_journal(scene, job_id)) > 40, 60, "the training to go on")
    database.start_again()
    assert scene.judge(job_id) == ["completed"]


@pytest.mark.parametrize("keeps_its_data", [True, False])
def test_redis_is_killed_and_comes_back_with_or_without_its_data(scene: Scene, *, keeps_its_data: bool) -> None:
    job_id = scene.post(steps=100)
    scene.wait_for_step(job_id, 3)
    scene.fleet.valkey.kill()
    waiting = scene.post(steps=10)  # accepted all the same
    if not keeps_its_data:
        scene.fleet.valkey.forget()
    scene.fleet.valkey.start()
    assert scene.judge(job_id) == ["completed"]
    assert scene.judge(waiting) == ["completed"]


@pytest.mark.parametrize("fault", [redis_answers_nonsense, redis_poisoned])
def test_nonsense_from_redis_costs_no_attempt_and_stops_no_loop(
    scene: Scene, fault: Callable[[Fleet, Random], Blow]
) -> None:
    job_id = scene.post(steps=100)
    scene.wait_for_step(job_id, 3)
    for _ in fault(scene.fleet, Random(7)):
        wait_until(lambda: len(_journal(scene, job_id)) > 40, 60, "the training to go on")
    assert scene.judge(job_id) == ["completed"]


def test_flushall_at_any_moment_loses_nothing(scene: Scene) -> None:
    with scene.fleet.valkey.client() as client:
        job_id = scene.post()
        client.flushall()  # with it the hand-over, or the claim
        for step in (3, 10, 30):
            scene.wait_for_step(job_id, step)
            client.flushall()
    assert scene.judge(job_id) == ["completed"]


def test_redis_away_for_longer_than_the_lease_costs_an_attempt_and_no_step(scene: Scene) -> None:
    job_id = scene.post(steps=1000)
    scene.wait_for_step(job_id, 3)
    scene.fleet.valkey.stop()
    wait_until(lambda: not scene.fleet.trainings(), 60, "the training to save and end by itself")
    assert len(_journal(scene, job_id)) > 40, "it trained on for a while"
    scene.fleet.valkey.start()
    wait_until(lambda: _first_step(scene, job_id, 2), 60, "a step of the next attempt")
    (first, second) = scene.fleet.database.attempts(job_id)
    assert second.first_step == (first.last_step or 0) + 1
    scene.users.obeyed[job_id] = ["cancel"]
    assert scene.users.ask("POST", f"/v1/jobs/{job_id}/cancel") is not None
    scene.judge(job_id)


def test_orders_to_trainings_that_hang_and_were_adopted_are_enforced(scene: Scene) -> None:
    (host,) = scene.fleet.hosts
    cancelled, handed_back = scene.post(steps=100), scene.post(steps=100)
    for job_id in (cancelled, handed_back):
        scene.wait_for_step(job_id, 3)
    host.end(signal.SIGKILL)
    for found in host.trainings():
        found.process.suspend()
    host.start()
    scene.fleet.command(f"/v1/workers/{host.name}/drain")
    scene.fleet.cancelled.add(cancelled)
    scene.fleet.command(f"/v1/jobs/{cancelled}/cancel")
    try:
        wait_until(
            lambda: (
                [scene.fleet.database.standings()[job].status for job in (cancelled, handed_back)]
                == [JobStatus.CANCELLED, JobStatus.QUEUED]
            ),
            90,
            "both orders to be enforced",
        )
    except AssertionError as error:
        raise AssertionError(f"{error}\n{scene.fleet.logs()}") from None
    assert not scene.fleet.trainings(), "something of an ended attempt is left"
    scene.fleet.command(f"/v1/workers/{host.name}/undrain")
    others = [scene.post(steps=20) for _ in range(2)]
    assert scene.judge(handed_back) == ["handed_back", "completed"]
    assert [scene.judge(job_id) for job_id in (cancelled, *others)] == [
        ["cancelled_by_user"],
        ["completed"],
        ["completed"],
    ]


def _first_step(scene: Scene, job_id: str, attempt: int) -> int | None:
    return next((one.first_step for one in scene.fleet.database.attempts(job_id) if one.attempt == attempt), None)


def _journal(scene: Scene, job_id: str) -> list[str]:
    """The lines of the job's present attempt on its host."""
    (directory, *_) = [path for path in scene.fleet.run_directories() if path.parent.name == job_id][::-1]
    return (directory / "events.jsonl").read_text().splitlines()
