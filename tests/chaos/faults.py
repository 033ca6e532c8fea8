"""The table of all faults.

A fault is a generator that breaks something, yields the affected jobs, and repairs it when it is resumed. A fault that
finds nothing to break ends without yielding and doesn't count. Only one fault is active at a time, but the next one
doesn't wait until all jobs have recovered.
"""

import contextlib
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from random import Random
from typing import Any

import psutil

from tests.chaos.databases import PostgresDatabase
from tests.chaos.fleet import LEASE_SECONDS, SELF_STOP_SECONDS, STALL_SECONDS, Fleet, Host
from tests.harness.non_redis_server import HTTP_ERROR, non_redis_server
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import SERVER_STREAM, WORKERS_HASH, worker_queue, worker_stream

INVALID_WORKER = "poisoned"  # the name of a worker with an invalid heartbeat
MIN_STEPS = 10  # enough for the watchdog to know the duration of a step


@dataclass(frozen=True)
class Impact:
    """The jobs that a fault affects, how long it lasts, and whether it ends their attempts."""

    jobs: frozenset[str]
    lasts_seconds: float = 0.0
    ends_attempts: bool = False


Injection = Generator[Impact]


@dataclass(frozen=True)
class Fault:
    name: str
    inject: Callable[[Fleet, Random], Injection]
    weight: int  # how often it occurs in each round


def training_killed(fleet: Fleet, rng: Random) -> Injection:
    leaders = sorted(
        (found for found in fleet.training_processes() if found.rank is None), key=lambda found: found.job_id
    )
    if leaders:
        victim = rng.choice(leaders)
        victim.process.kill()
        yield Impact(frozenset({victim.job_id}), ends_attempts=True)


def rank_killed(fleet: Fleet, rng: Random) -> Injection:
    ranks = [found for found in fleet.training_processes() if found.rank is not None]
    if ranks:
        victim = rng.choice(sorted(ranks, key=lambda found: (found.job_id, found.rank)))
        victim.process.kill()
        yield Impact(frozenset({victim.job_id}), ends_attempts=True)


def training_suspended(fleet: Fleet, rng: Random) -> Injection:
    """The watchdog ends the run. Otherwise (during a save), it is resumed after the stall limit."""
    job_states = fleet.database.job_states()
    found = sorted(fleet.training_processes(), key=lambda process: process.job_id)
    alone = [
        training
        for training in found
        if training.rank is None and sum(training.directory == other.directory for other in found) == 1
    ]
    candidates = [training for training in alone if (job_states[training.job_id].last_step or 0) >= MIN_STEPS]
    if candidates:
        victim = rng.choice(candidates)
        victim.process.suspend()
        yield Impact(frozenset({victim.job_id}), STALL_SECONDS + rng.uniform(3.0, 6.0))
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.process.resume()


def node_suspended(fleet: Fleet, rng: Random) -> Injection:
    """All processes of one node of several are frozen, as if its host were suspended; the others end without it."""
    job_states = fleet.database.job_states()
    found = [process for process in fleet.training_processes() if len(job_states[process.job_id].workers) > 1]
    directories = sorted({process.directory for process in found})
    if directories:
        directory = rng.choice(directories)
        node = [process for process in found if process.directory == directory]
        for each in node:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.process.suspend()
        yield Impact(frozenset({node[0].job_id}), STALL_SECONDS + rng.uniform(3.0, 6.0))
        for each in node:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.process.resume()


def worker_killed(fleet: Fleet, rng: Random) -> Injection:
    """The runs continue or end without their worker."""
    host = rng.choice(fleet.hosts)
    host.end(signal.SIGKILL)
    yield Impact(running(fleet, host), rng.uniform(0.0, SELF_STOP_SECONDS / 2))
    host.start()


def command_to_adopted_run(fleet: Fleet, rng: Random) -> Injection:
    """A run hangs and its worker is restarted; then its job is cancelled or paused, or the worker is drained."""
    leaders = {found.job_id: found for host in fleet.hosts for found in host.training_processes() if found.rank is None}
    if not leaders:
        return
    job_id = rng.choice(sorted(leaders))
    (host,) = [host for host in fleet.hosts if leaders[job_id].directory.is_relative_to(host.home)]
    host.end(signal.SIGKILL)
    for found in host.training_processes():
        if found.job_id == job_id:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.process.suspend()
    host.start()
    match rng.choice(("cancel", "pause", "drain")):
        case "drain":
            fleet.command(f"/v1/workers/{host.name}/drain")
            yield Impact(running(fleet, host), rng.uniform(4.0, 8.0), ends_attempts=True)
            fleet.command(f"/v1/workers/{host.name}/undrain")
        case command:
            if command == "cancel":
                fleet.cancelled.add(job_id)
            fleet.command(f"/v1/jobs/{job_id}/{command}")
            yield Impact(frozenset({job_id}), ends_attempts=True)


def worker_stopped(fleet: Fleet, rng: Random) -> Injection:
    host = rng.choice(fleet.hosts)
    jobs = running(fleet, host)
    host.end(signal.SIGTERM)
    yield Impact(jobs, rng.uniform(0.0, 3.0), ends_attempts=True)
    host.start()


def host_lost(fleet: Fleet, rng: Random) -> Injection:
    """The host is lost permanently, with its runs and its disk. Another one replaces it."""
    host = rng.choice(fleet.hosts)
    jobs = running(fleet, host)
    host.vanish()
    fleet.retire(host)
    yield Impact(jobs, rng.uniform(0.0, 3.0), ends_attempts=True)
    fleet.add_host()


def worker_lost(fleet: Fleet, rng: Random) -> Injection:
    """The worker is lost permanently; its runs continue until they notice. Another host replaces it."""
    host = rng.choice(fleet.hosts)
    jobs = running(fleet, host)
    host.end(signal.SIGKILL)
    fleet.retire(host)
    yield Impact(jobs, rng.uniform(0.0, 3.0), ends_attempts=True)
    fleet.add_host()


def network_cut(fleet: Fleet, rng: Random) -> Injection:
    return _cut(fleet, rng, rng.uniform(1.0, SELF_STOP_SECONDS - 2.0))


def network_cut_for_longer_than_the_lease(fleet: Fleet, rng: Random) -> Injection:
    return _cut(fleet, rng, LEASE_SECONDS + rng.uniform(5.0, 15.0))


def _cut(fleet: Fleet, rng: Random, seconds: float) -> Injection:
    host = rng.choice(fleet.hosts)
    host.relay.cut()
    yield Impact(running(fleet, host), seconds)
    host.relay.restore()


def server_killed(fleet: Fleet, rng: Random) -> Injection:
    server = rng.choice(fleet.servers)
    server.end(signal.SIGKILL)
    yield Impact(running(fleet), rng.uniform(0.0, 3.0))
    server.start()


def server_stopped(fleet: Fleet, rng: Random) -> Injection:
    server = rng.choice(fleet.servers)
    server.end(signal.SIGTERM)
    yield Impact(running(fleet), rng.uniform(0.0, 3.0))
    server.start()


def all_servers_killed(fleet: Fleet, rng: Random) -> Injection:
    if len(fleet.servers) > 1:
        for server in fleet.servers:
            server.end(signal.SIGKILL)
        yield Impact(running(fleet), rng.uniform(0.0, 3.0))
        for server in fleet.servers:
            server.start()


def redis_killed(fleet: Fleet, rng: Random) -> Injection:
    fleet.valkey.kill()
    yield Impact(running(fleet), rng.uniform(0.0, 5.0))
    fleet.valkey.start()


def redis_unavailable_for_longer_than_the_lease(fleet: Fleet, rng: Random) -> Injection:
    fleet.valkey.stop()
    yield Impact(running(fleet), LEASE_SECONDS + rng.uniform(1.0, 10.0))
    fleet.valkey.start()


def another_program_on_redis_port(fleet: Fleet, rng: Random) -> Injection:
    """Another program listens on Redis's port."""
    fleet.valkey.kill()
    response = rng.choice([HTTP_ERROR, b":one\r\n", b"\xff\xfe\r\n", b"-LOADING the dataset\r\n"])
    with non_redis_server(fleet.valkey.port, response):
        yield Impact(running(fleet), rng.uniform(1.0, SELF_STOP_SECONDS - 2.0))
    fleet.valkey.start()


def invalid_redis_entries(fleet: Fleet, rng: Random) -> Injection:
    """Invalid entries in every stream, queue and hash, and a key of the wrong type."""
    jobs = running(fleet)
    poison: dict[Any, Any] = {b"\xff": b"\xfe", "body": b"\xc3\x28", "signature": "s\u00fc\u00df"}
    with fleet.valkey.client() as client:
        client.hset(WORKERS_HASH, mapping={INVALID_WORKER: "[" * 50_000, b"\xff": b"\xfe"})
        for key in (SERVER_STREAM, *(worker_stream(host.name) for host in fleet.hosts)):
            client.xadd(key, poison)
        for host in fleet.hosts:
            client.lpush(worker_queue(host.name), b"\xff\xfe", "{}", "[[[")
        victim = rng.choice([SERVER_STREAM, WORKERS_HASH, *(worker_stream(host.name) for host in fleet.hosts)])
        client.delete(victim)
        client.set(victim, "of another type")
    yield Impact(jobs)


def redis_back_empty(fleet: Fleet, rng: Random) -> Injection:
    """Redis is killed and loses its disk."""
    fleet.valkey.kill()
    fleet.valkey.delete_data()
    yield Impact(running(fleet), rng.uniform(0.0, 5.0))
    fleet.valkey.start()


def flushall(fleet: Fleet, rng: Random) -> Injection:
    jobs = running(fleet)
    with fleet.valkey.client() as client:
        for _ in range(rng.randint(1, 3)):
            client.flushall()
    yield Impact(jobs)


def database_locked(fleet: Fleet, rng: Random) -> Injection:
    jobs = running(fleet)
    with fleet.database.locked():
        yield Impact(jobs, _short_or_longer_than_the_lease(rng))


def database_down(fleet: Fleet, rng: Random) -> Injection:
    if isinstance(fleet.database, PostgresDatabase):
        jobs = running(fleet)
        fleet.database.crash()
        yield Impact(jobs, _short_or_longer_than_the_lease(rng))
        fleet.database.start_again()


def worker_disk_full(fleet: Fleet, rng: Random) -> Injection:
    host = rng.choice(fleet.hosts)
    if host.disk is not None:
        host.disk.fill()
        yield Impact(running(fleet, host), rng.uniform(1.0, 8.0))
        host.disk.free()


def store_full(fleet: Fleet, rng: Random) -> Injection:
    if fleet.store_disk is not None:
        fleet.store_disk.fill()
        yield Impact(running(fleet), rng.uniform(1.0, 8.0))
        fleet.store_disk.free()


def clock_jumps(fleet: Fleet, rng: Random) -> Injection:
    """Shift the wall clock of one server, or of one host with its worker and runs, for some seconds."""
    present = [*(server.home.name for server in fleet.servers), *(host.name for host in fleet.hosts)]
    name = rng.choice(present)
    if name in fleet.clocks:
        fleet.clocks[name].jump(rng.choice([-7200, -300, 300, 7200]))
        yield Impact(running(fleet), rng.uniform(1.0, 8.0))
        fleet.clocks[name].jump(0)


def _short_or_longer_than_the_lease(rng: Random) -> float:
    return rng.uniform(0.0, 6.0) if rng.random() < 0.7 else LEASE_SECONDS + rng.uniform(0.0, 6.0)


FAULTS: tuple[Fault, ...] = (
    Fault("training killed (kill -9)", training_killed, 6),
    Fault("one rank of several killed (kill -9)", rank_killed, 3),
    Fault("training stopped (SIGSTOP)", training_suspended, 1),
    Fault("one node of several stopped (SIGSTOP)", node_suspended, 1),
    Fault("worker killed (kill -9) and restarted while its runs continue", worker_killed, 4),
    Fault("commands to adopted runs (one hangs, its worker was killed)", command_to_adopted_run, 2),
    Fault("worker stopped (SIGTERM) and restarted", worker_stopped, 2),
    Fault("host lost, another one started", host_lost, 2),
    Fault("worker lost, its runs left behind", worker_lost, 2),
    Fault("network cut between a worker and Redis", network_cut, 2),
    Fault("network cut for longer than the lease", network_cut_for_longer_than_the_lease, 1),
    Fault("server killed (kill -9) and restarted", server_killed, 3),
    Fault("server stopped (SIGTERM) and restarted", server_stopped, 1),
    Fault("all servers killed at once and restarted", all_servers_killed, 1),
    Fault("Redis killed (kill -9) and restarted", redis_killed, 2),
    Fault("Redis unavailable for longer than the lease", redis_unavailable_for_longer_than_the_lease, 1),
    Fault("another program on Redis's port", another_program_on_redis_port, 1),
    Fault("invalid entries in Redis", invalid_redis_entries, 2),
    Fault("Redis back without its data", redis_back_empty, 1),
    Fault("FLUSHALL", flushall, 3),
    Fault("database locked by another program", database_locked, 2),
    Fault("database down", database_down, 2),
    Fault("disk of a worker full", worker_disk_full, 2),
    Fault("disk of the artifact store full", store_full, 1),
    Fault("clock of a server or a host jumps", clock_jumps, 2),
)


def running(fleet: Fleet, *hosts: Host) -> frozenset[str]:
    """The jobs that are running on these hosts, or on any host."""
    names = {host.name for host in hosts or fleet.hosts}
    return frozenset(
        job_id
        for job_id, job_state in fleet.database.job_states().items()
        if job_state.status == JobStatus.RUNNING and job_state.workers & names
    )
