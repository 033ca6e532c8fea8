"""A server behind PgBouncer in transaction mode, where each transaction may use another session."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.harness.children import Account, start_child, stop_child
from tests.harness.ports import free_loopback_port
from tests.harness.postgres import PostgresServer
from tests.harness.waiting import wait_until
from tests.server.server_process import SPEC, running_server
from zeta_core.system.database_url import DatabaseAddress


@pytest.fixture
def pooled_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A new database behind PgBouncer in transaction mode, with fewer sessions than the server has connections."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not on the PATH")
    port = free_loopback_port()
    with postgres_server.fresh_database() as url, TemporaryDirectory(prefix="pgbouncer-") as folder:
        address = DatabaseAddress.parse(url)
        configuration = Path(folder) / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host=127.0.0.1 port={address.hosts[0][1]} user=postgres password={address.password}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\npool_mode = transaction\n"
            "default_pool_size = 3\nunix_socket_dir =\n"
        )
        Path(folder).chmod(0o755)
        nobody = pwd.getpwnam("nobody")
        account = Account(uid=nobody.pw_uid, gid=nobody.pw_gid) if os.geteuid() == 0 else None
        process = start_child([program, configuration], log_file=Path(folder) / "log", account=account)
        try:
            wait_until(lambda: _listens(port), 30, "PgBouncer to listen")
            yield f"postgresql://postgres@127.0.0.1:{port}/{address.database}?pgbouncer=true"
        finally:
            stop_child(process, stop_signal=signal.SIGINT)


def _listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.extended
def test_a_server_behind_pgbouncer_in_transaction_mode(tmp_path: Path, redis_url: str, pooled_url: str) -> None:
    with running_server(tmp_path / "home", redis_url, pooled_url) as server, server.http() as http:
        with ThreadPoolExecutor(8) as pool:
            posted = [pool.submit(http.post, "/v1/jobs", json=SPEC) for _ in range(40)]
            listed = [pool.submit(http.get, "/v1/jobs") for _ in range(80)]
            assert {future.result().status_code for future in posted} == {201}
            assert {future.result().status_code for future in listed} == {200}
        ids = [future.result().json()["id"] for future in posted]
        assert {http.post(f"/v1/jobs/{job_id}/cancel").status_code for job_id in ids} == {202}
        assert http.get("/readyz").json()["parts"]["database"] == "ok"
        assert "Traceback" not in server.log()
