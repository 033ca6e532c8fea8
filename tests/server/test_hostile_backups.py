"""A backup that an operator has received can't read or write files outside of its folder and the artifact store."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from server.backup.restore import restore_backup
from server.settings import StorageSettings
from tests.harness.service import clean_environment
from zeta_core.contract.errors import InvalidRequest, Unavailable

JOB = "job_" + "0" * 24
OUTSIDE = "../" * 20
FILE = {"key": f"files/file_{'0' * 24}", "bytes": 7, "sha256": "0" * 64}
CHECKPOINT = {"job": JOB, "name": "final", "manifest_sha256": "0" * 64}
HOSTILE_FIELDS: dict[str, dict[str, Any]] = {
    "a key above the store": {"files": [{**FILE, "key": "files/../../admin.key"}]},
    "an absolute key": {"files": [{**FILE, "key": "/etc/cron.d/x"}]},
    "a key with NUL": {"files": [{**FILE, "key": "files/a\0b"}]},
    "a key with an escape sequence": {"files": [{**FILE, "key": "files/\x1b[2J"}]},
    "an object above the folder": {"files": [{**FILE, "sha256": f"{OUTSIDE}etc/shadow"}]},
    "an absolute object": {"files": [{**FILE, "sha256": "/dev/zero"}]},
    "an absolute database": {"database": {"key": "database", "bytes": 1, "sha256": "/etc/shadow"}},
    "a job above the store": {"jobs": ["../../home"]},
    "a checkpoint of a path": {"checkpoints": [{**CHECKPOINT, "name": "../../x"}]},
    "a manifest above the folder": {"checkpoints": [{**CHECKPOINT, "manifest_sha256": f"{OUTSIDE}etc/passwd"}]},
    "a service that is a list": {"service": []},
    "an unknown format": {"format": 99},
}


def store_object(folder: Path, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / "objects" / sha256[:2] / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return sha256


def write_backup(folder: Path, content: bytes = b"", **fields: Any) -> Path:
    sha256 = store_object(folder, content)
    saved = {
        "version": "0.1.0",
        "service": None,
        "created_at": "2026-11-30T00:00:00Z",
        "database": {"key": "database", "bytes": len(content), "sha256": sha256},
        "files": [],
        "checkpoints": [],
        "jobs": [],
        **fields,
    }
    (folder / "backup.json").write_text(json.dumps(saved))
    return folder


def restore(backup: Path, home: Path) -> list[str]:
    """The keys of the damaged files of a backup."""
    variables = {**clean_environment(), "ZETA_HOME": str(home)}
    return restore_backup(StorageSettings.from_environment(variables), backup, variables).problems


@pytest.mark.parametrize("fields", HOSTILE_FIELDS.values(), ids=HOSTILE_FIELDS)
def test_a_backup_that_names_something_outside_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    backup = write_backup(tmp_path / "backup", **fields)
    with pytest.raises(InvalidRequest, match=r"backup\.json cannot be read"):
        restore(backup, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_objects_that_are_links_or_pipes_and_invalid_manifests_are_damaged(tmp_path: Path) -> None:
    """A link to a secret file would copy it to the store, and a pipe or /dev/zero would never end."""
    backup, secret = tmp_path / "backup", b"a secret of the operator"
    (tmp_path / "secret").write_bytes(secret)
    outside = {"path": "../../x", "size": 1, "sha256": "0" * 64, "role": "weights"}
    manifest = store_object(backup, json.dumps({"run_id": "run", "files": [outside]}).encode())
    linked, pipe, endless = (hashlib.sha256(text).hexdigest() for text in (secret, b"pipe", b"endless"))
    for sha256 in (linked, pipe, endless):
        (backup / "objects" / sha256[:2]).mkdir(exist_ok=True)
    (backup / "objects" / linked[:2] / linked).symlink_to(tmp_path / "secret")
    os.mkfifo(backup / "objects" / pipe[:2] / pipe)
    (backup / "objects" / endless[:2] / endless).symlink_to("/dev/zero")
    files = [{**FILE, "key": f"files/{sha256}", "sha256": sha256} for sha256 in (linked, pipe, endless)]
    checkpoint = {**CHECKPOINT, "manifest_sha256": manifest}
    write_backup(backup, files=files, jobs=[JOB], checkpoints=[checkpoint])
    damaged = restore(backup, tmp_path / "home")
    assert damaged == sorted([*(file["key"] for file in files), f"jobs/{JOB}/checkpoints/final"])
    copies = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert copies == []


@pytest.mark.parametrize("database", [b"not a database", b"SQLite format 3\0" + bytes(500)], ids=["text", "zeros"])
def test_a_backup_with_an_invalid_database_is_refused(tmp_path: Path, database: bytes) -> None:
    backup = write_backup(tmp_path / "backup", database)
    with pytest.raises((InvalidRequest, Unavailable), match="database"):
        restore(backup, tmp_path / "home")
    assert not (tmp_path / "home" / "zeta.db").exists()
