"""The commands for keys, projects and the audit log, with a real service."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness.service import ZETA, clean_environment
from tests.harness.valkey import ValkeyServer
from tests.server.server_process import API_KEY, ServerProcess, running_server
from zeta.client import Client
from zeta_core.contract.errors import NotFound, PermissionDenied


@pytest.fixture(scope="module")
def server(shared_valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("server"), shared_valkey.second_url) as process:
        yield process


@pytest.fixture
def admin(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url, API_KEY) as client:
        yield client


def zeta(server: ServerProcess, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "ZETA_URL": server.url, "ZETA_API_KEY": API_KEY, **variables}
    return subprocess.run([str(ZETA), *words], env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_two_printed_lines_give_a_colleague_access(server: ServerProcess, admin: Client) -> None:
    done = zeta(server, "keys", "create", "--name", "Ada", "--project", "vision", "--scopes", "submit")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition("=")[0] for line in lines] == ["export ZETA_URL", "export ZETA_API_KEY"]
    key = next(key for key in admin.admin.keys(project="vision") if key.name == "Ada")
    assert f"Created {key.id} in the new project vision (scopes: submit). The key can't be shown again." in done.stderr
    assert "This URL works only on this machine" in done.stderr
    script = "; ".join([*lines, f"exec {ZETA} jobs --json"])
    colleague = subprocess.run(
        ["sh", "-c", script], env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert json.loads(colleague.stdout)["data"] == []
    refused = zeta(server, "keys", ZETA_API_KEY=lines[1].partition("=")[2])
    assert (refused.returncode, "requires the scope 'admin'" in refused.stderr) == (1, True)


def test_keys_are_listed_rotated_and_revoked_by_name_or_id(server: ServerProcess, admin: Client) -> None:
    created = admin.admin.create_key("robot", scopes=["read"], project="cli")
    listed = zeta(server, "keys", "--project", "cli")
    assert ("robot" in listed.stdout, created.key in listed.stdout) == (True, False)
    assert zeta(server, "keys", "list", "--project", "cli").stdout.split()[:7] == listed.stdout.split()[:7]
    rotated = json.loads(zeta(server, "keys", "rotate", "robot", "--grace", "1h", "--json").stdout)
    assert rotated["id"] == created.id
    for text in (created.key, rotated["key"]):
        with Client(server.url, text) as client:
            assert client.admin.own_key().name == "robot"
    done = zeta(server, "keys", "revoke", created.id[:20])
    assert (done.returncode, done.stdout) == (0, f"Revoked {created.id} (robot).\n"), done.stderr
    assert "revoked" in zeta(server, "keys", "--project", "cli", "--revoked").stdout
    assert "robot" not in zeta(server, "keys", "--project", "cli").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("create", "--name", "n", "--scopes", "write"), "scopes.0 is 'write'; it must be 'read', 'submit', 'admin'"),
        (
            ("create", "--name", "n", "--scopes", "read", "--expires", "soon"),
            "--expires is 'soon'; it must be a duration",
        ),
        (("create", "--name", "n", "--scopes", "read", "--expires", "2030-01-01"), "--expires is '2030-01-01'; add"),
        (("revoke", "nobody"), "Key 'nobody' not found; `zeta keys` lists the keys."),
        (("rotate", "admin"), "is the one in the server's settings"),
    ],
)
def test_invalid_arguments_are_refused_with_the_fix(
    server: ServerProcess, words: tuple[str, ...], sentence: str
) -> None:
    done = zeta(server, "keys", *words)
    assert done.returncode != 0
    assert sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_projects_are_created_listed_and_deleted(server: ServerProcess) -> None:
    assert zeta(server, "projects", "create", "speech").returncode == 0
    assert "speech" in zeta(server, "projects").stdout
    assert zeta(server, "projects", "delete", "speech").stdout == "Deleted project speech.\n"
    names = [project["name"] for project in json.loads(zeta(server, "projects", "--json").stdout)["data"]]
    assert ("default" in names, "speech" in names) == (True, False)


def test_limits_of_a_project_are_set_and_shown(server: ServerProcess, admin: Client) -> None:
    admin.admin.create_project("limited", {"max_priority": 5})
    words = ("max_stored_bytes=50GiB", "max_running_jobs=4", "max_priority=default", "hub=off")
    done = zeta(server, "projects", "set", "limited", *words)
    assert done.returncode == 0, done.stderr
    assert ["stored", "0 B of 50.0 GiB"] in [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert zeta(server, "projects", "show", "limited").stdout.splitlines()[2:] == done.stdout.splitlines()[2:]
    limits = {name: value for name, value in admin.admin.project("limited").limits.items() if value is not None}
    assert limits == {"max_stored_bytes": 50 << 30, "max_running_jobs": 4, "hub": "off"}
    assert "0 of 4" in zeta(server, "projects").stdout
    for word, sentence in (
        ("max_running_jobs=many", "'max_running_jobs=many' is not a valid limit; use LIMIT=NUMBER"),
        ("max_running_jobs=4GiB", "'max_running_jobs=4GiB' is not a valid limit"),
        ("max_runing_jobs=4", "did you mean 'limits.max_running_jobs'?"),
        ("max_priority=-101", "it must be at least -100"),
        ("hub=private", "it must be 'off', 'public' or 'operator-token'"),
    ):
        refused = zeta(server, "projects", "set", "limited", word)
        assert (refused.returncode, sentence in refused.stderr) == (2, True), refused.stderr


def test_an_admin_acts_in_the_project_of_the_setting(server: ServerProcess, admin: Client) -> None:
    key = admin.admin.create_key("n", scopes=["submit"], project="acted")
    spec = {"model": {"config": {"model_type": "llama"}}, "dataset": {"builtin": "python-docs"}, "max_steps": 1}
    with Client(server.url, key.key) as colleague:
        job = colleague.submit(spec)
        with pytest.raises(PermissionDenied, match="requires the scope 'admin'"):
            colleague.drain("w")
    with pytest.raises(NotFound, match="in project 'acted'"):
        admin.job(job.id)
    with Client(server.url, API_KEY, project="acted") as acting:
        assert acting.job(job.id).id == job.id
    assert json.loads(zeta(server, "jobs", "--json").stdout)["data"] == []
    assert job.id in zeta(server, "jobs", ZETA_PROJECT="acted").stdout
    assert zeta(server, "cancel", job.id, ZETA_PROJECT="acted").returncode == 0
    assert "ZETA_PROJECT is 'Not one'" in zeta(server, "jobs", ZETA_PROJECT="Not one").stderr


def test_the_audit_log_is_listed(server: ServerProcess, admin: Client) -> None:
    created = admin.admin.create_key("audited", scopes=["read"], project="cli")
    (entry,) = admin.admin.audit(object_id=created.id)
    assert (entry.action, entry.key_name, entry.project) == ("key.create", "admin", "cli")
    listed = zeta(server, "audit", "--object", created.id).stdout
    assert "key.create" in listed
    assert json.loads(zeta(server, "audit", "--limit", "1", "--json").stdout)["data"][0]["id"].startswith("audit_")
