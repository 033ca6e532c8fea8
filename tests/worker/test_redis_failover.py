"""A job and its service outlive the loss of the Redis master, with Sentinel; and Redis behind TLS with an ACL user."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from tests.harness.certificates import self_signed
from tests.harness.fleet import small_fleet
from tests.harness.redis_sentinel import MASTER, MonitoredValkey
from tests.harness.tls_relay import TlsRelay
from tests.harness.valkey import ValkeyServer

FAILOVER_SECONDS = 30.0
# As in docs/operations/databases.md.
RULES = (
    *("resetkeys", "~zeta*", "~_kombu*", "resetchannels", "-@all"),
    *("+@read", "+@write", "+@connection", "+@transaction", "-@dangerous"),
)


@pytest.mark.extended
def test_jobs_continue_when_sentinel_replaces_the_redis_master(tmp_path: Path) -> None:
    monitored = MonitoredValkey(tmp_path / "redis")
    monitored.start()
    try:
        with small_fleet(tmp_path, monitored.url) as fleet:
            fleet.start_engine()
            fleet.start_worker(ZETA_WORKER_SLOTS="2")
            running = fleet.submit(steps="150", seconds_per_step="0.1", checkpoint_every="20")
            fleet.wait_for_step(running, 3)
            monitored.kill_sentinel()
            monitored.master.kill()
            killed_at = time.monotonic()
            waiting = fleet.submit(steps="3")
            assert fleet.wait_for_status(waiting, "succeeded").attempt == 1
            assert time.monotonic() - killed_at < FAILOVER_SECONDS
            assert fleet.wait_for_status(running, "succeeded").attempt == 1
            fleet.check_events(running)
            with monitored.replica.client() as client:
                assert client.info("replication")["role"] == "master"
                assert set(client.info("keyspace")) == {"db3"}
    finally:
        monitored.stop()


def test_an_unknown_master_is_reported_as_an_outage(tmp_path: Path, own_valkey: ValkeyServer) -> None:
    url = f"redis+sentinel://127.0.0.1:{own_valkey.port}/0?master={MASTER}"  # not a sentinel
    with small_fleet(tmp_path, url) as fleet:
        engine = fleet.start_engine()
        assert not engine.redis_ok


def test_redis_behind_tls_with_an_acl_user(tmp_path: Path, own_valkey: ValkeyServer) -> None:
    certificate = self_signed(tmp_path)
    relay = TlsRelay(own_valkey.port, certificate)
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "zeta", "on", ">p@ss", *RULES)
        client.execute_command("ACL", "SETUSER", "default", "off")
        try:
            url = f"rediss://zeta:p%40ss@localhost:{relay.port}/0?ssl_ca_certs={certificate.certificate}"
            with small_fleet(tmp_path, url) as fleet:
                fleet.start_engine()
                fleet.start_worker()
                assert fleet.wait_for_status(fleet.submit(steps="3"), "succeeded").attempt == 1
        finally:
            relay.close()
        assert relay.num_connections > 0
        assert client.acl_log() == [], "no command was refused"
    with (
        redis.Redis(port=own_valkey.port, username="zeta", password="p@ss") as other,
        pytest.raises(NoPermissionError),
    ):
        other.get("the key of another program")
