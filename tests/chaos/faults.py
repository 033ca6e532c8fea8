"""The faults, one table: what each strikes, for how long it lasts, and how it is mended.

A fault is a generator: it strikes, yields what it hit, and mends when it is resumed. One that finds nothing to hit ends
without yielding, and was not struck. One at a time is under way, but the next does not wait until the last is recovered
from.
"""

import contextlib
import signal
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import psutil

from tests.chaos.databases import PostgresUnderFire
from tests.chaos.fleet import LEASE_SECONDS, SELF_STOP_SECONDS, STALL_SECONDS, Fleet, Host
from tests.harness.non_redis_server import HTTP_ERROR, non_redis_server
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.messages import SERVER_STREAM, WORKERS_HASH, worker_queue, worker_stream

POISONED_WORKER = "poisoned"  # the name of a heartbeat that nobody can read
MIN_STEPS = 10  # so many that the watchdog knows its pace


@dataclass(frozen=True)
class Hit:
    """The jobs that ran where the fault struck, until when it lasts, and whether their attempts end by it."""

    jobs: frozenset[str]
    lasts_seconds: float = 0.0
    ends_attempts: bool = False


Blow = Generator[Hit]


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Fleet, Random], Blow]
    weight: int  # how often in each round of the table


def training_killed(fleet: Fleet, dice: Random) -> Blow:
    leaders = sorted((found for found in fleet.trainings() if found.rank is None), key=lambda found: found.job_id)
    if leaders:
        victim = dice.choice(leaders)
        victim.process.kill()
        yield Hit(frozenset({victim.job_id}), ends_attempts=True)


def rank_killed(fleet: Fleet, dice: Random) -> Blow:
    ranks = [found for found in fleet.trainings() if found.rank is not None]
    if ranks:
        victim = dice.choice(sorted(ranks, key=lambda found: (found.job_id, found.rank)))
        victim.process.kill()
        yield Hit(frozenset({victim.job_id}), ends_attempts=True)


def training_stands_still(fleet: Fleet, dice: Random) -> Blow:
    """It is ended by the watchdog, and wakes where the watchdog does not look (in the middle of a save)."""
    standings = fleet.database.standings()
    found = sorted(fleet.trainings(), key=lambda process: process.job_id)
    alone = [one for one in found if one.rank is None and sum(one.job_id == other.job_id for other in found) == 1]
    under_way = [one for one in alone if (standings[one.job_id].last_step or 0) >= MIN_STEPS]
    if under_way:
        victim = dice.choice(under_way)
        victim.process.suspend()
        yield Hit(frozenset({victim.job_id}), STALL_SECONDS + dice.uniform(3.0, 6.0))
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.process.resume()


def worker_killed(fleet: Fleet, dice: Random) -> Blow:
    """Its trainings go on, or end, without it."""
    host = dice.choice(fleet.hosts)
    host.end(signal.SIGKILL)
    yield Hit(running(fleet, host), dice.uniform(0.0, SELF_STOP_SECONDS / 2))
    host.start()


def order_to_adopted_trainings(fleet: Fleet, dice: Random) -> Blow:
    """A training hangs, its worker is killed and restarted, and then its job is cancelled or paused, or the worker
    drained."""
    leaders = {found.job_id: found for host in fleet.hosts for found in host.trainings() if found.rank is None}
    if not leaders:
        return
    job_id = dice.choice(sorted(leaders))
    (host,) = [host for host in fleet.hosts if leaders[job_id].directory.is_relative_to(host.home)]
    host.end(signal.SIGKILL)
    for found in host.trainings():
        if found.job_id == job_id:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.process.suspend()
    host.start()
    match dice.choice(("cancel", "pause", "drain")):
        case "drain":
            fleet.command(f"/v1/workers/{host.name}/drain")
            yield Hit(running(fleet, host), dice.uniform(4.0, 8.0), ends_attempts=True)
            fleet.command(f"/v1/workers/{host.name}/undrain")
        case command:
            if command == "cancel":
                fleet.cancelled.add(job_id)
            fleet.command(f"/v1/jobs/{job_id}/{command}")
            yield Hit(frozenset({job_id}), ends_attempts=True)


def worker_told_to_stop(fleet: Fleet, dice: Random) -> Blow:
    host = dice.choice(fleet.hosts)
    hit = running(fleet, host)
    host.end(signal.SIGTERM)
    yield Hit(hit, dice.uniform(0.0, 3.0), ends_attempts=True)
    host.start()


def host_gone(fleet: Fleet, dice: Random) -> Blow:
    """For ever, with its trainings and its disk; another machine takes its place."""
    host = dice.choice(fleet.hosts)
    hit = running(fleet, host)
    host.vanish()
    fleet.retire(host)
    yield Hit(hit, dice.uniform(0.0, 3.0), ends_attempts=True)
    fleet.add_host()


def worker_gone(fleet: Fleet, dice: Random) -> Blow:
    """For ever; its trainings live until they notice that nobody supervises them. Another machine takes its place."""
    host = dice.choice(fleet.hosts)
    hit = running(fleet, host)
    host.end(signal.SIGKILL)
    fleet.retire(host)
    yield Hit(hit, dice.uniform(0.0, 3.0), ends_attempts=True)
    fleet.add_host()


def line_cut(fleet: Fleet, dice: Random) -> Blow:
    return _cut(fleet, dice, dice.uniform(1.0, SELF_STOP_SECONDS - 2.0))


def line_cut_for_longer_than_the_lease(fleet: Fleet, dice: Random) -> Blow:
    return _cut(fleet, dice, LEASE_SECONDS + dice.uniform(5.0, 15.0))


def _cut(fleet: Fleet, dice: Random, seconds: float) -> Blow:
    host = dice.choice(fleet.hosts)
    host.line.cut()
    yield Hit(running(fleet, host), seconds)
    host.line.heal()


def server_killed(fleet: Fleet, dice: Random) -> Blow:
    server = dice.choice(fleet.servers)
    server.end(signal.SIGKILL)
    yield Hit(running(fleet), dice.uniform(0.0, 3.0))
    server.start()


def server_told_to_stop(fleet: Fleet, dice: Random) -> Blow:
    server = dice.choice(fleet.servers)
    server.end(signal.SIGTERM)
    yield Hit(running(fleet), dice.uniform(0.0, 3.0))
    server.start()


def every_server_killed(fleet: Fleet, dice: Random) -> Blow:
    if len(fleet.servers) > 1:
        for server in fleet.servers:
            server.end(signal.SIGKILL)
        yield Hit(running(fleet), dice.uniform(0.0, 3.0))
        for server in fleet.servers:
            server.start()


def redis_killed(fleet: Fleet, dice: Random) -> Blow:
    fleet.valkey.kill()
    yield Hit(running(fleet), dice.uniform(0.0, 5.0))
    fleet.valkey.start()


def redis_away_for_longer_than_the_lease(fleet: Fleet, dice: Random) -> Blow:
    fleet.valkey.stop()
    yield Hit(running(fleet), LEASE_SECONDS + dice.uniform(1.0, 10.0))
    fleet.valkey.start()


def redis_answers_nonsense(fleet: Fleet, dice: Random) -> Blow:
    """Something that is not Redis has its port."""
    fleet.valkey.kill()
    answer = dice.choice([HTTP_ERROR, b":one\r\n", b"\xff\xfe\r\n", b"-LOADING the dataset\r\n"])
    with non_redis_server(fleet.valkey.port, answer):
        yield Hit(running(fleet), dice.uniform(1.0, SELF_STOP_SECONDS - 2.0))
    fleet.valkey.start()


def redis_poisoned(fleet: Fleet, dice: Random) -> Blow:
    """Entries that nobody can read in every stream, queue and hash, and a key of another type."""
    hit = running(fleet)
    poison: dict[Any, Any] = {b"\xff": b"\xfe", "body": b"\xc3\x28", "signature": "s\u00fc\u00df"}
    with fleet.valkey.client() as client:
        client.hset(WORKERS_HASH, mapping={POISONED_WORKER: "[" * 50_000, b"\xff": b"\xfe"})
        for key in (SERVER_STREAM, *(worker_stream(host.name) for host in fleet.hosts)):
            client.xadd(key, poison)
        for host in fleet.hosts:
            client.lpush(worker_queue(host.name), b"\xff\xfe", "{}", "[[[")
        victim = dice.choice([SERVER_STREAM, WORKERS_HASH, *(worker_stream(host.name) for host in fleet.hosts)])
        client.delete(victim)
        client.set(victim, "of another type")
    yield Hit(hit)


def redis_back_empty(fleet: Fleet, dice: Random) -> Blow:
    """Killed, and its disk lost."""
    fleet.valkey.kill()
    fleet.valkey.forget()
    yield Hit(running(fleet), dice.uniform(0.0, 5.0))
    fleet.valkey.start()


def flushall(fleet: Fleet, dice: Random) -> Blow:
    hit = running(fleet)
    with fleet.valkey.client() as client:
        for _ in range(dice.randint(1, 3)):
            client.flushall()
    yield Hit(hit)


def database_locked(fleet: Fleet, dice: Random) -> Blow:
    hit = running(fleet)
    with fleet.database.locked():
        yield Hit(hit, _short_or_longer_than_the_lease(dice))


def database_down(fleet: Fleet, dice: Random) -> Blow:
    if isinstance(fleet.database, PostgresUnderFire):
        hit = running(fleet)
        fleet.database.crash()
        yield Hit(hit, _short_or_longer_than_the_lease(dice))
        fleet.database.start_again()


def worker_disk_full(fleet: Fleet, dice: Random) -> Blow:
    host = dice.choice(fleet.hosts)
    if host.disk is not None:
        host.disk.fill()
        yield Hit(running(fleet, host), dice.uniform(1.0, 8.0))
        host.disk.free()


def store_full(fleet: Fleet, dice: Random) -> Blow:
    if fleet.store_disk is not None:
        fleet.store_disk.fill()
        yield Hit(running(fleet), dice.uniform(1.0, 8.0))
        fleet.store_disk.free()


def clock_jumps(fleet: Fleet, dice: Random) -> Blow:
    """The wall clock of one server, or of one host with its worker and trainings, for a while."""
    present = [*(server.home.name for server in fleet.servers), *(host.name for host in fleet.hosts)]
    name = dice.choice(present)
    if name in fleet.clocks:
        fleet.clocks[name].jump(dice.choice([-7200, -300, 300, 7200]))
        yield Hit(running(fleet), dice.uniform(1.0, 8.0))
        fleet.clocks[name].jump(0)


def _short_or_longer_than_the_lease(dice: Random) -> float:
    return dice.uniform(0.0, 6.0) if dice.random() < 0.7 else LEASE_SECONDS + dice.uniform(0.0, 6.0)


FAULTS: tuple[Fault, ...] = (
    Fault("training killed (kill -9)", training_killed, 6),
    Fault("one rank of several killed (kill -9)", rank_killed, 3),
    Fault("training stands still (SIGSTOP)", training_stands_still, 1),
    Fault("worker killed (kill -9), restarted while its trainings go on", worker_killed, 4),
    Fault("orders to adopted trainings (one hangs, kill -9 of its worker)", order_to_adopted_trainings, 2),
    Fault("worker told to stop (SIGTERM), restarted", worker_told_to_stop, 2),
    Fault("host gone for ever, another one started", host_gone, 2),
    Fault("worker gone for ever, its trainings left behind", worker_gone, 2),
    Fault("network cut between a worker and Redis", line_cut, 2),
    Fault("network cut for longer than the lease", line_cut_for_longer_than_the_lease, 1),
    Fault("server killed (kill -9), restarted", server_killed, 3),
    Fault("server told to stop (SIGTERM), restarted", server_told_to_stop, 1),
    Fault("every server killed at once, restarted", every_server_killed, 1),
    Fault("Redis killed (kill -9), restarted", redis_killed, 2),
    Fault("Redis away for longer than the lease", redis_away_for_longer_than_the_lease, 1),
    Fault("Redis answers nonsense: another program has its port", redis_answers_nonsense, 1),
    Fault("invalid entries in Redis", redis_poisoned, 2),
    Fault("Redis back without its data", redis_back_empty, 1),
    Fault("FLUSHALL", flushall, 3),
    Fault("database locked by another program", database_locked, 2),
    Fault("database down", database_down, 2),
    Fault("disk of a worker full", worker_disk_full, 2),
    Fault("disk of the artifact store full", store_full, 1),
    Fault("clock of a server or a host jumps", clock_jumps, 2),
)


def running(fleet: Fleet, *hosts: Host) -> frozenset[str]:
    """The jobs that run now, on these hosts or on any."""
    names: Iterable[str] = {host.name for host in hosts or fleet.hosts}
    return frozenset(
        job_id
        for job_id, standing in fleet.database.standings().items()
        if standing.status == JobStatus.RUNNING and standing.worker in names
    )
