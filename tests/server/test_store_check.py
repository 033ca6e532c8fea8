"""`zeta artifacts check`: the artifact store is compared with the database."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.settings import StorageSettings
from server.store_check import check
from tests.server.stored_service import StoredService
from zeta_core.contract.errors import InvalidSettings
from zeta_core.contract.identifiers import new_id
from zeta_core.contract.wire.run_directory import checkpoint_key, file_key


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


@pytest.mark.extended
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
        settings = StorageSettings(home=service.settings.home, artifacts_url=str(folder))
        with pytest.raises(InvalidSettings, match=reason):
            asyncio.run(check(settings, verify_content=False))
