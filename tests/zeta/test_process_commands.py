"""`zeta migrate`, `zeta server` and `zeta worker`, which run the individual processes of the service."""

import subprocess
from pathlib import Path

import pytest

from tests.harness.service import ZETA, clean_environment


def zeta(*words: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ZETA, *words],
        env=clean_environment() | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.extended
def test_migrate_creates_the_database_and_does_nothing_the_second_time(tmp_path: Path) -> None:
    assert zeta("migrate", "--home", tmp_path).returncode == 0
    assert (tmp_path / "zeta.db").is_file()
    again = zeta("migrate", "--home", tmp_path)
    assert again.returncode == 0
    assert "already" in again.stderr


@pytest.mark.extended
def test_server_rejects_a_database_without_tables_and_names_the_command(tmp_path: Path) -> None:
    done = zeta("server", "--home", tmp_path, "--port", "0", ZETA_WORKER_SECRET="secret")
    assert done.returncode == 2
    assert "zeta migrate" in done.stderr


@pytest.mark.extended
def test_a_missing_secret_is_reported_by_its_variable(tmp_path: Path) -> None:
    for command in ("server", "worker"):
        done = zeta(command, "--home", tmp_path)
        assert done.returncode == 2
        assert "ZETA_WORKER_SECRET is not set" in done.stderr


def test_a_local_folder_does_not_shadow_an_installed_package(tmp_path: Path) -> None:
    for package in ("migrations", "zeta"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package')")
    done = subprocess.run(
        [ZETA, "migrate", "--home", tmp_path / "home"],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
