"""`zeta artifacts check`: the artifact store is compared with the database."""

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from migrations.upgrade import upgrade
from server.artifact_ownership import claim_store
from server.database.connections import Database
from server.database.service_identity import identify_service
from server.database.tables import FileRow
from server.settings import ServerSettings, StoreCheckSettings
from server.store_check import check
from tests.harness.service import ZETA, clean_environment
from tests.server.rows import CREATED_AT, Rows
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import checkpoint_key, file_key
from zeta_core.system.artifact_store.folder import FolderStore

CONTENT_SHA256 = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"  # of b"content"


class StoredService:
    """A home with a file, an ended job and a running job, as a server leaves it."""

    def __init__(self, home: Path) -> None:
        self.settings = ServerSettings(home=home, worker_secret="secret")
        upgrade(self.settings.database)
        rows = Rows(self.settings)
        self.file_id = new_id("file")
        asyncio.run(self._claim())
        self.path(file_key(self.file_id)).write_bytes(b"content")
        self.ended, self.running = rows.job(), rows.job()
        rows.attempt(self.ended, log="the log", to=JobStatus.SUCCEEDED)
        rows.attempt(self.running, log="the log")
        rows.checkpoint(self.ended, "final", 4, {"model/weights": ("weights", b"w" * 100), "config": ("config", b"{}")})

    def path(self, key: object) -> Path:
        return self.settings.artifacts / str(key)

    def check(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [ZETA, "artifacts", "check", "--home", str(self.settings.home), *words]
        return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False)

    async def _claim(self) -> None:
        database = Database(self.settings.database)
        claim_store(self.settings, FolderStore(self.settings.artifacts), await identify_service(database))
        row = FileRow(
            id=self.file_id,
            project="default",
            created_by="test",
            filename="data.jsonl",
            bytes=len(b"content"),
            sha256=CONTENT_SHA256,
            purpose="dataset",
            created_at=CREATED_AT,
        )
        async with database.write() as session:
            session.add(row)
        await database.close()


@pytest.fixture
def service(tmp_path: Path) -> StoredService:
    return StoredService(tmp_path)


def test_a_store_that_matches_its_database_has_no_differences(service: StoredService) -> None:
    of_running = service.path(checkpoint_key(service.running, "step-2"))
    of_running.mkdir(parents=True)
    (of_running / "weights").write_bytes(b"its worker stores this checkpoint now")
    done = service.check("--hash")
    assert (done.returncode, done.stderr) == (0, "")
    store = service.settings.artifacts  # with a file, two logs, and four files of checkpoints
    assert done.stdout == f"7 files in {store} match the database. Their content was verified.\n"


def test_each_kind_of_difference_is_listed(service: StoredService) -> None:
    final = checkpoint_key(service.ended, "final")
    deleted, unknown = new_id("job"), new_id("file")
    service.path(final / "model/weights").write_bytes(b"w" * 99)
    service.path(final / "config").write_bytes(b"[]")
    service.path(file_key(service.file_id)).unlink()
    service.path(file_key(unknown)).write_bytes(b"1")
    service.path(checkpoint_key(service.ended, "step-1")).mkdir()
    service.path(checkpoint_key(service.ended, "step-1") / "weights").write_bytes(b"12")
    service.path(checkpoint_key(deleted, "final")).mkdir(parents=True)
    service.path(checkpoint_key(deleted, "final") / "weights").write_bytes(b"123")
    done = service.check("--hash", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    expected: list[tuple[str, str, int | None, int | None]] = [
        ("missing", str(file_key(service.file_id)), 7, None),
        ("extra", str(file_key(unknown)), None, 1),
        ("wrong_size", str(final / "model/weights"), 100, 99),
        ("wrong_content", str(final / "config"), 2, 2),
        ("extra", str(checkpoint_key(service.ended, "step-1") / "weights"), None, 2),
        ("extra", str(checkpoint_key(deleted, "final") / "weights"), None, 3),
    ]
    found: list[dict[str, Any]] = json.loads(done.stdout)["differences"]
    assert sorted(tuple(difference.values()) for difference in found) == sorted(expected)


def test_a_damaged_manifest_is_one_difference(service: StoredService) -> None:
    manifest = checkpoint_key(service.ended, "final") / "manifest.json"
    service.path(manifest).write_text("{")
    done = service.check()
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"wrong content  {manifest}  (1 bytes stored)",
        f"6 files in {service.settings.artifacts} were compared with the database: 1 difference. "
        "Their content was not verified (--hash).",
    ]


def test_a_store_that_is_not_mounted_or_of_another_service_is_refused(service: StoredService, tmp_path: Path) -> None:
    other = StoredService(tmp_path / "other").settings.artifacts
    for folder, reason in ((tmp_path / "nothing", "it is not mounted"), (other, "which belongs to service svc_")):
        settings = StoreCheckSettings(home=service.settings.home, artifacts_url=str(folder))
        with pytest.raises(InvalidSettings, match=reason):
            asyncio.run(check(settings, verify_content=False))
