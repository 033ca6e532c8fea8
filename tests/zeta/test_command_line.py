"""The command line without a server: help, usage, settings, and error messages instead of tracebacks."""

import json
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.core
import typer.main

from tests.harness.ports import free_loopback_port
from tests.harness.service import ZETA, clean_environment
from zeta.cli.app import app
from zeta.cli.entry_point import add_commands
from zeta_core.contract.errors import ErrorBody


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has never used zeta."""
    return {**clean_environment(), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}


def zeta(environment: dict[str, str], *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ZETA, *words], env=environment, capture_output=True, text=True, timeout=60, check=False, input=text
    )


def test_help_lists_the_commands(environment: dict[str, str]) -> None:
    names = (
        "submit validate data jobs job wait logs events cancel pause resume rerun delete checkpoints download upload "
        "files workers config login up down status server worker migrate"
    )
    listed = {
        line.split()[0]
        for line in zeta(environment, "--help").stdout.splitlines()
        if line.startswith("  ") and line.split()
    }
    assert set(names.split()) <= listed


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["job"], ["jobs", "--limit", "0"], ["submit", "--nonsense"], ["upload", "x", "--purpose", "fun"]],
)
def test_wrong_usage_exits_with_2_and_names_the_mistake(environment: dict[str, str], words: list[str]) -> None:
    done = zeta(environment, *words)
    assert done.returncode == 2
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["events", "@last", "--after", "x"], "--after is 'x'; it must be a whole number."),
        (["events", "@last", "--after", "1.5"], "--after is '1.5'; it must be a whole number."),
        (["logs", "@last", "--tail", "-1"], "--tail is '-1'; it must be at least 0."),
        (["wait", "@last", "--timeout", "soon"], "--timeout is 'soon'; it must be a number."),
        (["server", "--port", "70000"], "--port is '70000'; it must be at most 65535."),
        (["data", "show", "x", "--rows", "many"], "--rows is 'many'; it must be a whole number."),
        (["upload", "x", "--purpose", "fun"], "--purpose: 'fun' is not one of 'dataset', 'model'."),
    ],
)
def test_an_invalid_value_is_one_sentence(environment: dict[str, str], words: list[str], sentence: str) -> None:
    done = zeta(environment, *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: {sentence}\n")


@pytest.mark.extended
def test_with_json_an_error_is_one_line_on_standard_error(environment: dict[str, str], tmp_path: Path) -> None:
    nowhere = {**environment, "ZETA_URL": f"http://127.0.0.1:{free_loopback_port()}"}
    missing = str(tmp_path / "missing.yaml")
    for used, words, status, code, param, suggestion in (
        (environment, ["nonsense", "--json"], 2, "invalid_usage", None, None),
        (environment, ["jobs", "--json", "--limt", "3"], 2, "invalid_usage", "--limt", "--limit"),
        (environment, ["events", "@last", "--json", "--after", "x"], 2, "invalid_usage", "--after", None),
        (environment, ["submit", missing, "--json"], 2, "unreadable_spec", None, None),
        ({**environment, "ZETA_PORT": "many"}, ["up", "--json"], 2, "invalid_settings", "ZETA_PORT", None),
        (environment, ["job", "@last", "--json"], 4, "unreachable", None, None),
        (nowhere, ["jobs", "--json"], 4, "unreachable", None, None),
    ):
        done = zeta(used, *words)
        assert (done.returncode, done.stdout) == (status, ""), done
        (line,) = done.stderr.splitlines()
        error = ErrorBody.model_validate_json(line).error
        assert (error.code, error.param) == (code, param), error
        assert [detail.suggestion for detail in error.details][:1] == ([suggestion] if param else []), error


def test_every_command_has_json_except_processes_and_receipts() -> None:
    """A receipt is JSON already."""
    add_commands()
    app_group = typer.main.get_command(app)
    assert isinstance(app_group, typer.core.TyperGroup)
    commands = dict(app_group.commands)
    for name in ("artifacts", "data", "import"):  # they only have subcommands
        group = commands.pop(name)
        assert isinstance(group, typer.core.TyperGroup)
        commands |= group.commands
    without = [
        name
        for name, command in commands.items()
        if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == ["receipt", "server", "migrate", "worker"]


@pytest.mark.parametrize("words", [["jobs"], ["job", "@last"], ["workers"], ["status"], ["download", "@last"]])
def test_without_a_server_commands_exit_with_4_and_the_fix(environment: dict[str, str], words: list[str]) -> None:
    done = zeta(environment, *words)
    assert (done.returncode, done.stdout) == (4, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "zeta up" in done.stderr


@pytest.mark.extended
def test_an_unresponsive_server_exits_with_4_and_names_the_address(environment: dict[str, str]) -> None:
    url = f"http://127.0.0.1:{free_loopback_port()}"
    started = time.monotonic()
    done = zeta({**environment, "ZETA_URL": url}, "jobs")
    assert done.returncode == 4
    assert url in done.stderr
    assert "ZETA_URL" in done.stderr
    assert time.monotonic() - started < 20


def test_an_unreadable_spec_exits_with_2_and_one_sentence(environment: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "job.yaml"
    broken.write_text("model: [")
    for words in (["submit", str(broken)], ["submit", str(tmp_path / "missing.yaml")], ["submit"]):
        done = zeta(environment, *words)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith("Error: ")


def test_an_invalid_setting_exits_with_2_and_names_the_variable(environment: dict[str, str]) -> None:
    done = zeta({**environment, "ZETA_PORT": "many"}, "up")
    assert done.returncode == 2
    assert "ZETA_PORT" in done.stderr
    assert "many" in done.stderr


def test_config_shows_the_settings_and_hides_the_secrets(environment: dict[str, str]) -> None:
    secret = "very-secret-key"
    done = zeta({**environment, "ZETA_API_KEY": secret, "ZETA_URL": "http://box:8400"}, "config")
    assert done.returncode == 0
    assert secret not in done.stdout + done.stderr
    assert "http://box:8400" in done.stdout
    shown = zeta({**environment, "ZETA_API_KEY": secret, "ZETA_URL": "http://box:8400"}, "config", "--json")
    facts = json.loads(shown.stdout)
    assert facts["server"] == "http://box:8400"
    assert facts["settings"]["ZETA_API_KEY"] == "***"


def test_config_shows_the_settings_passed_on_to_server_and_worker(environment: dict[str, str]) -> None:
    shown = zeta({**environment, "ZETA_WORKER_SLOTS": "3", "ZETA_DATA_ROOT": "/data"}, "config", "--json")
    settings = json.loads(shown.stdout)["settings"]
    assert (settings["ZETA_WORKER_SLOTS"], settings["ZETA_DATA_ROOT"]) == ("3", "/data")


def test_status_shows_no_counts_without_a_server(environment: dict[str, str]) -> None:
    done = zeta({**environment, "ZETA_URL": f"http://127.0.0.1:{free_loopback_port()}"}, "status", "--json")
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["ready"], facts["workers"], facts["jobs_running"]) == (4, False, None, None)


def test_down_without_a_running_service_reports_it(environment: dict[str, str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = zeta(environment, "down", "--home", str(home))
    assert done.returncode == 0
    assert f"No service is running in {home}" in done.stdout
    assert not home.exists()


def test_a_port_in_use_is_reported_before_anything_starts(environment: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = zeta(environment, "up", "--home", str(tmp_path / "home"), "--port", str(port))
    assert done.returncode == 2
    assert f"Port {port}" in done.stderr
    assert "--port" in done.stderr
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert list((tmp_path / "home" / "logs").iterdir()) == []


def test_a_closed_pipe_causes_no_traceback(environment: dict[str, str]) -> None:
    reader = f"import subprocess, sys; p = subprocess.Popen([{str(ZETA)!r}, 'config'], stdout=subprocess.PIPE, "
    reader += "stderr=subprocess.PIPE); p.stdout.close(); print(p.stderr.read().decode()); p.wait()"
    done = subprocess.run(
        [sys.executable, "-c", reader], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""
