"""Finding the server, and sending a key only to the server that it belongs to."""

import fcntl
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from zeta.server_lookup import find_server
from zeta.stored_login import Login, login_file, read_login, remove_login, store_login
from zeta.up.home import Home, UpState
from zeta_core.contract.errors import InvalidSettings


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """An environment isolated from this user's own settings."""
    return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config"), "ZETA_HOME": str(tmp_path / "home")}


@contextmanager
def running_up(home: Home, url: str = "http://127.0.0.1:9999", certificate: str | None = None) -> Generator[None]:
    """The files of a running `zeta up`: its lock, ``up.json`` and the key."""
    home.create()
    home.secret(home.admin_key, "zeta_")
    with home.locked():
        started = datetime.now(UTC)
        home.write_state(UpState(state="ready", pid=os.getpid(), url=url, started_at=started, certificate=certificate))
        yield


def test_without_settings_and_a_running_service_no_server_is_found(variables: dict[str, str]) -> None:
    assert find_server(variables) is None


def test_the_running_zeta_up_is_found_with_its_key(variables: dict[str, str]) -> None:
    home = Home(Path(variables["ZETA_HOME"]))
    with running_up(home):
        target = find_server(variables)
        assert target is not None
        assert (target.url, target.api_key) == ("http://127.0.0.1:9999", home.admin_key.read_text().strip())


def test_the_certificate_of_the_running_zeta_up_is_trusted_only_for_its_url(variables: dict[str, str]) -> None:
    here, elsewhere, key = "https://127.0.0.1:9999", "https://train.example.org", "zeta_own"
    with running_up(Home(Path(variables["ZETA_HOME"])), here, "PEM"):
        for settings in ({}, {"ZETA_URL": here}, {"ZETA_URL": here, "ZETA_API_KEY": key}):
            target = find_server(variables | settings)
            assert target is not None
            assert (target.url, target.certificate) == (here, "PEM")
        for settings in ({"ZETA_URL": elsewhere}, {"ZETA_URL": elsewhere, "ZETA_API_KEY": key}):
            target = find_server(variables | settings)
            assert target is not None
            assert target.certificate is None


def test_the_state_of_a_killed_zeta_up_is_ignored(variables: dict[str, str]) -> None:
    home = Home(Path(variables["ZETA_HOME"]))
    with running_up(home):
        pass
    assert home.state.exists()
    assert find_server(variables) is None


def test_zeta_url_takes_precedence_and_gets_no_key_of_another_server(variables: dict[str, str]) -> None:
    home = Home(Path(variables["ZETA_HOME"]))
    with running_up(home):
        other = find_server({**variables, "ZETA_URL": "http://elsewhere:8400/"})
        assert other is not None
        assert (other.url, other.api_key) == ("http://elsewhere:8400", None)
        same = find_server({**variables, "ZETA_URL": "http://127.0.0.1:9999"})
        assert same is not None
        assert same.api_key == home.admin_key.read_text().strip()


def test_a_login_is_stored_for_this_user_only(variables: dict[str, str]) -> None:
    file = store_login(variables, Login(url="http://box:8400", api_key="secret"))
    assert file == login_file(variables)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    target = find_server(variables)
    assert target is not None
    assert (target.url, target.api_key, target.source) == ("http://box:8400", "secret", str(file))
    store_login(variables, Login(url="http://box:8401", api_key="newer"))
    assert read_login(variables) == Login(url="http://box:8401", api_key="newer")
    assert remove_login(variables)
    assert not remove_login(variables)
    assert find_server(variables) is None


def test_only_an_explicit_home_takes_precedence_over_a_login(variables: dict[str, str], tmp_path: Path) -> None:
    store_login(variables, Login(url="http://box:8400", api_key="secret"))
    with running_up(Home(tmp_path / "home")):
        named = find_server(variables)
        assert named is not None
        assert named.url == "http://127.0.0.1:9999"
    unnamed = {name: value for name, value in variables.items() if name != "ZETA_HOME"}
    found = find_server(unnamed)
    assert found is not None
    assert found.url == "http://box:8400"


@pytest.mark.parametrize("url", ["localhost:8400", "ftp://box", "http://", "http://a b"])
def test_an_invalid_url_is_rejected_with_an_example(variables: dict[str, str], url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"ZETA_URL.*http://127\.0\.0\.1:8400"):
        find_server({**variables, "ZETA_URL": url})


def test_an_invalid_login_file_is_rejected_with_the_fix(variables: dict[str, str]) -> None:
    file = store_login(variables, Login(url="http://box:8400"))
    file.write_text("{")
    with pytest.raises(InvalidSettings, match="zeta login"):
        find_server(variables)


def test_secrets_are_created_once_for_this_user_only(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    first = home.secret(home.admin_key, "zeta_")
    assert first.startswith("zeta_")
    assert len(first) > 40
    home.admin_key.chmod(0o644)
    assert home.secret(home.admin_key, "zeta_") == first
    assert stat.S_IMODE(home.admin_key.stat().st_mode) == 0o600
    assert [file.name for file in home.path.iterdir() if file.name.startswith(".")] == []


def test_the_lock_of_a_home_is_released_with_its_holder(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with home.locked(), home.lock.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with home.locked():
        pass
