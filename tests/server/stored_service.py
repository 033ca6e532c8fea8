"""A service's data without a running server, and `zeta` commands on it."""

import asyncio
import subprocess
from pathlib import Path

from migrations.upgrade import upgrade
from server.artifact_ownership import claim_store
from server.database.connections import Database
from server.database.file_tables import FileRow
from server.database.service_identity import identify_service
from server.settings import ServerSettings
from tests.harness.service import ZETA, clean_environment
from tests.server.rows import CREATED_AT, Rows
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.job.status import JobStatus
from zeta_core.contract.wire.run_directory import file_key
from zeta_core.system.artifact_store.folder import FolderStore

CONTENT_SHA256 = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"  # of b"content"


class StoredService:
    """A home with a file, an ended job and a running job, as a server leaves it."""

    def __init__(self, home: Path, database_url: str | None = None) -> None:
        self.settings = ServerSettings(home=home, worker_secret="secret", database_url=database_url)
        upgrade(self.settings.database)
        self.rows = rows = Rows(self.settings)
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
        """Run `zeta artifacts check`."""
        return run_zeta("artifacts", "check", *words, home=self.settings.home, database_url=self.settings.database_url)

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


def run_zeta(
    *words: str, home: Path, database_url: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command on the data in ``home``; ``None`` is the SQLite database in it."""
    environment = {**clean_environment(), "ZETA_DATABASE_URL": database_url or "", **variables}
    command = [ZETA, *words, "--home", home]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
