"""Jobs on several workers: all nodes are placed, prepared and started together, and they end together."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from server.database.placements import PlacementRow, placements_of, unreleased_placements
from server.engine.nodes import ends
from tests.harness.fleet import SECRET, SmallFleet, small_fleet
from tests.harness.simulated_worker import SimulatedWorker, checkpoint, progress, status
from tests.harness.waiting import wait_until
from tests.server.stepped_scheduler import SteppedScheduler, change, waiting_code
from zeta_core.contract.wire.messages import NODES_VERSION, SERVER_STREAM, Go, JournalAck, Prepared, StopRequest
from zeta_core.contract.wire.signatures import sign_body

NODES = {"model": "m", "resources": {"nodes": 2, "processes": 2}}
ADDRESSES = {"a": "127.0.0.2", "b": "127.0.0.3"}


@pytest.fixture
def idle_fleet(tmp_path: Path) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, "redis://127.0.0.1:1/0") as fleet:
        yield fleet


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallFleet]:
    monkeypatch.setattr(ends, "END_SECONDS", 1.0)
    with small_fleet(tmp_path, redis_url, lease_seconds=6, prepare_seconds=4) as fleet:
        fleet.start_engine()
        yield fleet


def placements(fleet: SmallFleet, job_id: str, attempt: int) -> Sequence[PlacementRow]:
    async def read() -> Sequence[PlacementRow]:
        async with fleet.database.read() as session:
            return await placements_of(session, job_id, attempt)

    return fleet.loop.run(read())


def unreleased(fleet: SmallFleet) -> list[tuple[int, str]]:
    """The attempts and workers whose slots are not released."""

    async def read() -> list[tuple[int, str]]:
        async with fleet.database.read() as session:
            return [(row.attempt, row.worker) for row in await unreleased_placements(session)]

    return fleet.loop.run(read())


class Workers:
    """Two simulated workers, and the attempts that each of them lists."""

    def __init__(self, fleet: SmallFleet, client: "redis.Redis") -> None:
        self.fleet = fleet
        self.by_name = {name: SimulatedWorker(client, SECRET, name, slots=2) for name in ADDRESSES}
        self.listed: dict[str, list[tuple[str, int]]] = {name: [] for name in ADDRESSES}

    def send_heartbeats(self) -> None:
        for name, worker in self.by_name.items():
            worker.send_heartbeat(*self.listed[name])

    def wait_until(self, reached: Any, subject: str) -> None:
        def beat_and_check() -> bool:
            self.send_heartbeats()
            return bool(reached())

        wait_until(beat_and_check, 30, subject)

    def claim(self, job_id: str, attempt: int = 1, names: Sequence[str] = ("a", "b")) -> None:
        """Wait for the dispatch, then claim these nodes and list them."""
        self.wait_until(lambda: len(placements(self.fleet, job_id, attempt)) == 2, f"attempt {attempt}")
        for name in names:
            assert self.by_name[name].claim(job_id, attempt).granted
            self.listed[name] = [(job_id, attempt)]

    def prepared(self, name: str, job_id: str, attempt: int = 1) -> Prepared:
        rank = list(ADDRESSES).index(name)
        return Prepared(
            job_id=job_id,
            attempt=attempt,
            worker=name,
            incarnation=self.by_name[name].incarnation,
            node_rank=rank,
            address=ADDRESSES[name],
            port=4000 + rank,
        )

    def send_prepared(self, name: str, job_id: str, attempt: int = 1) -> None:
        self.by_name[name].send(self.prepared(name, job_id, attempt))

    def start(self, job_id: str, attempt: int = 1) -> None:
        """Claim and prepare both nodes, and receive their `Go`."""
        self.claim(job_id, attempt)
        for name in self.by_name:
            self.send_prepared(name, job_id, attempt)
        for worker in self.by_name.values():
            worker.receive(Go, job_id)

    def leave(self, name: str) -> None:
        """The worker has no process of the attempt any more."""
        self.listed[name] = []


@pytest.fixture
def workers(fleet: SmallFleet, client: "redis.Redis") -> Workers:
    return Workers(fleet, client)


def test_all_nodes_are_placed_on_workers_of_one_kind_or_none(idle_fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(idle_fleet)
    job_id = idle_fleet.submit(spec=NODES)
    narrow = idle_fleet.submit(spec={"model": "m"})
    old = {"slots": 2, "contract_version": NODES_VERSION - 1}
    stepped.update_workers(
        a={"slots": 2, "running": [("job_other", 1)]}, b=2, old=old, other={"slots": 2, "device_kind": "c"}
    )
    assert stepped.step() == [(narrow, "old")]
    message = (idle_fleet.job(job_id).waiting_reason or {})["message"]
    assert message.startswith("1 of 2 workers has 2 free slots; the job starts when more are free. Busy: a (1 free).")
    assert waiting_code(idle_fleet, job_id) == "resources"
    stepped.update_workers(a=2, b=2)
    assert stepped.step() == [(job_id, "a"), (job_id, "b")]
    sent = [(message.node_rank, message.num_nodes, message.processes, message.slots) for message in stepped.sent[1:]]
    assert sent == [(0, 2, 2, [0, 1]), (1, 2, 2, [0, 1])]
    rows = placements(idle_fleet, job_id, 1)
    assert [(row.node_rank, row.worker, row.slots, row.state) for row in rows] == [
        (0, "a", [0, 1], "dispatched"),
        (1, "b", [0, 1], "dispatched"),
    ]
    (attempt,) = idle_fleet.attempts(job_id)
    assert (attempt.num_nodes, attempt.is_preparing) == (2, True)


def test_a_job_on_more_workers_than_are_connected_says_how_many_are_missing(idle_fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(idle_fleet)
    job_id = idle_fleet.submit(spec={"model": "m", "resources": {"nodes": 3}})
    stepped.update_workers(a=1, b=1)
    assert stepped.step() == []
    message = (idle_fleet.job(job_id).waiting_reason or {})["message"]
    assert "needs 3 workers with 1 slot of the same kind each, and 2 of 3 such workers accept jobs" in message


def test_a_job_waits_for_a_worker_that_accepts_no_jobs_and_reserves_nothing(idle_fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(idle_fleet)
    job_id = idle_fleet.submit(spec=NODES)
    narrow = idle_fleet.submit(spec={"model": "m"})
    stepped.update_workers(a=2, b={"slots": 2, "disk_low": True})
    assert stepped.step() == [(narrow, "a")]
    reason = idle_fleet.job(job_id).waiting_reason or {}
    assert (reason["code"], reason["details"]) == ("disk", {"worker": "b"})
    assert "1 of those that could run it accepts jobs; the others are being drained or have" in reason["message"]


def test_an_attempt_is_given_up_at_once_if_a_worker_cannot_be_notified(idle_fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(idle_fleet, fails=True)
    job_id = idle_fleet.submit(spec=NODES)
    stepped.update_workers(a=2, b=2)
    assert stepped.step() == []
    job = idle_fleet.job(job_id)
    assert (job.status, job.attempt, job.failures, waiting_code(idle_fleet, job_id)) == (
        "queued",
        1,
        0,
        "retry_backoff",
    )
    assert "Worker a (node 0) could not be reached through Redis." in (job.waiting_reason or {})["message"]


def test_an_elastic_job_continues_on_another_number_of_workers(idle_fleet: SmallFleet) -> None:
    stepped = SteppedScheduler(idle_fleet)
    elastic = {"min_nodes": 1, "max_nodes": 4}
    spec = {"model": "m", "resources": {"nodes": 2}, "elastic": elastic, "global_batch_size": 8}
    job_id = idle_fleet.submit(spec=spec)  # also its resolved spec
    stepped.update_workers(
        a=1, b={"slots": 1, "running": [("job_other", 1)]}, c={"slots": 1, "running": [("job_x", 1)]}
    )
    assert stepped.step() == []  # the first attempt uses resources.nodes
    change(idle_fleet, job_id, attempt=1)
    assert stepped.step() == [(job_id, "a")]
    assert (stepped.sent[-1].num_nodes, "elastic" in stepped.sent[-1].spec) == (1, False)
    change(idle_fleet, job_id, attempt=2, worker=None, slots=None, dispatched_at=None)
    stepped.update_workers(a=1, b=1, c=1)
    assert stepped.step() == [(job_id, "a"), (job_id, "b")]  # 3 does not divide the global batch
    assert stepped.sent[-1].spec["resources"] == {"gpus": 0, "nodes": 2, "processes": None}


def test_nodes_start_together_and_the_job_succeeds_when_all_have_ended(fleet: SmallFleet, workers: Workers) -> None:
    job_id = fleet.submit(spec=NODES)
    workers.claim(job_id)
    workers.send_prepared("b", job_id)
    workers.send_prepared("a", job_id)
    for rank, worker in enumerate(workers.by_name.values()):
        go = worker.receive(Go, job_id)
        assert isinstance(go, Go)
        assert (go.incarnation, go.group.node_rank) == (worker.incarnation, rank)
        assert (go.group.addresses, go.group.port) == (["127.0.0.2", "127.0.0.3"], 4000)
    workers.send_prepared("b", job_id)  # its answer was lost
    workers.by_name["b"].receive(Go, job_id)
    first, second = workers.by_name.values()
    assert second.publish(job_id, 1, progress(1), status("running")).stored_line == 2
    assert first.publish(job_id, 1, progress(1), status("succeeded")).stored_line == 2
    assert fleet.job(job_id).status == "running"
    warning = {**progress(2), "type": "warning", "code": "slow", "message": "Slow."}
    assert second.publish(job_id, 3, warning, status("succeeded")).stored_line == 4
    fleet.wait_for_status(job_id, "succeeded")
    assert [event.fields["step"] for event in fleet.events(job_id) if event.type == "progress"] == [1]
    warnings = [event.fields["evidence"] for event in fleet.events(job_id) if event.type == "warning"]
    assert warnings == [{"node": 1, "worker": "b"}]
    fleet.check_events(job_id)
    assert unreleased(fleet) == []
    again = second.publish(job_id, 4, status("succeeded"))  # its acknowledgement was lost
    assert (again.fenced, again.stored_line) == (True, 4)


FORGED: dict[str, dict[str, Any]] = {
    "a zone with an escape sequence": {"address": "fe80::1%\x1b[2J"},
    "a zone with NUL": {"address": "fe80::1%\0"},
    "a long zone": {"address": "fe80::1%" + "x" * 10_000},
    "a host name": {"address": "example.com"},
    "an address with a port": {"address": "127.0.0.2:80"},
    "port 0": {"port": 0},
    "a port beyond 16 bits": {"port": 65_536},
    "a negative node": {"node_rank": -1},
}


def test_a_lying_node_changes_neither_its_job_nor_the_start_of_the_others(fleet: SmallFleet, workers: Workers) -> None:
    job_id = fleet.submit(spec=NODES)
    workers.claim(job_id)
    first, second = workers.by_name.values()
    prepared = workers.prepared("b", job_id).model_dump()
    for fields in FORGED.values():
        body = json.dumps({**prepared, **fields})
        second.send_raw({**sign_body(body, second.key, channel=SERVER_STREAM)})
    second.send(workers.prepared("a", job_id))  # in the name of the other node
    second.send(workers.prepared("b", job_id).model_copy(update={"node_rank": 0, "address": "127.0.0.9"}))
    ack = second.receive(JournalAck, job_id)
    assert isinstance(ack, JournalAck)
    assert ack.fenced
    assert fleet.engine is not None
    assert fleet.engine.dropped.rejected == {"malformed": len(FORGED), "sender": 1}
    assert {(row.address, row.port) for row in placements(fleet, job_id, 1)} == {(None, None)}
    for name in workers.by_name:
        workers.send_prepared(name, job_id)
    go = first.receive(Go, job_id)
    assert isinstance(go, Go)
    assert (go.group.addresses, go.group.port) == (["127.0.0.2", "127.0.0.3"], 4000)
    decided = fleet.job(job_id).resolved_spec
    lies = [status("running", resolved_spec={"learning_rate": 0.5}), checkpoint(1), progress(9), status("succeeded")]
    assert second.publish(job_id, 1, *lies).stored_line == len(lies)
    assert fleet.job(job_id).status == "running"
    assert fleet.job(job_id).resolved_spec == decided
    assert not {event.type for event in fleet.events(job_id)} & {"checkpoint", "progress"}


@pytest.mark.extended
def test_an_incomplete_attempt_is_given_up_and_holds_nothing(fleet: SmallFleet, workers: Workers) -> None:
    job_id = fleet.submit(spec=NODES)
    workers.claim(job_id)
    workers.send_prepared("a", job_id)
    workers.wait_until(lambda: fleet.job(job_id).status == "queued", "the start to be given up")
    reason = fleet.job(job_id).waiting_reason or {}
    assert reason["code"] == "retry_backoff"
    assert "Worker b (node 1) did not fetch its inputs within 4 s." in reason["message"]
    (attempt,) = fleet.attempts(job_id)
    assert (attempt.reason, fleet.job(job_id).failures) == ("nodes_not_ready", 0)
    for name, worker in workers.by_name.items():
        ack = worker.receive(JournalAck, job_id)
        assert isinstance(ack, JournalAck)
        assert ack.fenced
        workers.leave(name)
    workers.wait_until(lambda: unreleased(fleet) == [], "both workers to be released")


@pytest.mark.extended
def test_a_failed_node_ends_the_attempt_and_the_next_one_waits_for_the_others(
    fleet: SmallFleet, workers: Workers
) -> None:
    job_id = fleet.submit(spec=NODES)
    workers.start(job_id)
    error = {"code": "process_killed", "message": "Killed by SIGKILL."}
    workers.by_name["b"].publish(job_id, 1, status("failed", reason="process_killed", error=error))
    workers.leave("b")
    workers.wait_until(lambda: fleet.job(job_id).status == "queued", "the attempt to end")
    assert fleet.events(job_id)[-1].fields["message"].startswith("Node 1 (b): Killed by SIGKILL.")
    ack = workers.by_name["a"].receive(JournalAck, job_id)
    assert isinstance(ack, JournalAck)
    assert ack.fenced
    workers.wait_until(lambda: waiting_code(fleet, job_id) == "ending", "the job to wait for worker a")
    assert unreleased(fleet) == [(1, "a")]
    workers.leave("a")
    workers.start(job_id, 2)
    assert [attempt.reason for attempt in fleet.attempts(job_id)] == ["process_killed", None]


def test_the_node_with_the_frozen_rank_explains_a_stall_of_all_nodes(fleet: SmallFleet, workers: Workers) -> None:
    job_id = fleet.submit(spec=NODES, max_retries=0)
    workers.start(job_id)
    for name, rank in (("a", None), ("b", 3)):
        error = {"code": "stalled", "message": "The run stalled.", "evidence": {"rank": rank}}
        workers.by_name[name].publish(job_id, 1, status("failed", reason="stalled", error=error))
    fleet.wait_for_status(job_id, "failed")
    error = fleet.job(job_id).error or {}
    assert (error["message"], error["evidence"]["rank"]) == ("Node 1 (b): The run stalled.", 3)


@pytest.mark.extended
def test_a_node_that_lost_contact_ends_the_attempt_on_the_others(fleet: SmallFleet, workers: Workers) -> None:
    job_id = fleet.submit(spec=NODES)
    workers.start(job_id)
    del workers.by_name["b"]
    workers.wait_until(lambda: fleet.job(job_id).status == "queued", "the lease of b to expire")
    assert (fleet.attempts(job_id)[0].reason, fleet.job(job_id).failures) == ("worker_lost", 0)
    workers.leave("a")
    workers.wait_until(lambda: unreleased(fleet) == [], "worker a to be released")
    workers.wait_until(lambda: waiting_code(fleet, job_id) in ("never_fits", "no_worker"), "the reason of the wait")


@pytest.mark.extended
def test_a_success_of_node_0_counts_although_another_node_is_lost(
    fleet: SmallFleet, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "END_SECONDS", 60.0)
    job_id = fleet.submit(spec=NODES)
    workers.start(job_id)
    workers.by_name["a"].publish(job_id, 1, status("succeeded"))
    workers.leave("a")
    del workers.by_name["b"]
    workers.wait_until(lambda: fleet.job(job_id).status != "running", "the lease of b to expire")
    assert fleet.job(job_id).status == "succeeded"
    assert unreleased(fleet) == []


@pytest.mark.extended
def test_a_node_that_fails_while_it_is_prepared_uses_no_running_time(fleet: SmallFleet, workers: Workers) -> None:
    job_id = fleet.submit(spec={**NODES, "time_limit_seconds": 0.001})
    workers.claim(job_id)
    error = {"code": "launch_failed", "message": "No port."}
    workers.by_name["b"].publish(job_id, 1, status("failed", reason="launch_failed", error=error))
    workers.wait_until(lambda: fleet.job(job_id).status != "running", "the attempt to end")
    assert (fleet.job(job_id).status, fleet.attempts(job_id)[0].reason) == ("queued", "launch_failed")
    for name in workers.by_name:
        workers.leave(name)
    workers.start(job_id, 2)
    workers.wait_until(lambda: workers.by_name["a"].receive(StopRequest, job_id), "the time limit of the run")


@pytest.mark.extended
def test_stop_requests_reach_all_nodes_and_a_start_is_cancelled_at_once(fleet: SmallFleet, workers: Workers) -> None:
    running = fleet.submit(spec=NODES)
    workers.start(running)
    fleet.request(running, "pause")
    workers.send_heartbeats()
    for worker in workers.by_name.values():
        request = worker.receive(StopRequest, running)
        assert isinstance(request, StopRequest)
        assert request.action == "pause"
    paused = status("paused", reason="paused_by_user")
    workers.by_name["b"].publish(running, 1, paused)
    workers.leave("b")
    assert fleet.job(running).status == "running"  # node 0 may still be storing its checkpoint
    workers.by_name["a"].publish(running, 1, paused)
    workers.leave("a")
    fleet.wait_for_status(running, "paused")

    preparing = fleet.submit(spec=NODES)
    workers.claim(preparing, names=["a"])
    fleet.request(preparing, "cancel")
    workers.wait_until(lambda: fleet.job(preparing).status == "cancelled", "the start to be cancelled")
    workers.leave("a")
    workers.wait_until(lambda: unreleased(fleet) == [], "both workers to be released")
