"""What a command imports, which decides how fast it starts. `benchmarks/command_line.py` measures the time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.command_line import serving, stored_page
from tests.harness.service import clean_environment
from zeta.cli.app import app
from zeta.cli.entry_point import add_commands
from zeta.cli.modules import MODULES

NOT_FOR_HELP = frozenset({"httpx", "pydantic", "rich", "ruamel", "zeta.client", "zeta_core.contract.errors", "asyncio"})
NOT_FOR_JOBS = frozenset(
    {"rich.console", "click", "pygments", "ruamel", "torch", "tarfile", "httpx_sse"}
    | {"zeta.download", "zeta.upload", "zeta.local_inputs", "zeta.spec_file", "zeta.event_stream", "zeta.log_stream"}
    | {"zeta.cli.submit", "zeta.cli.failures"}
    | {"zeta_core.contract.spec.job_spec", "zeta_core.contract.spec.options", "zeta_core.contract.spec.sources"}
    | {"zeta_core.contract.job.events", "zeta_core.contract.job.estimate", "zeta_core.contract.wire.messages"}
)


def imports_of(environment: dict[str, str], *words: str) -> tuple[str, set[str]]:
    """Run a command; return its output and all modules that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "zeta", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**clean_environment(), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_help_imports_neither_an_http_client_nor_models(environment: dict[str, str]) -> None:
    output, imported = imports_of(environment, "--help")
    assert "submit" in output
    assert "typer" in imported
    assert imported & NOT_FOR_HELP == set()


def test_listing_jobs_imports_nothing_of_other_commands(environment: dict[str, str]) -> None:
    with serving(stored_page()) as url:
        output, imported = imports_of({**environment, "ZETA_URL": url}, "jobs")
    assert "succeeded" in output
    assert {"httpx", "zeta.client", "zeta_core.contract.job.job"} <= imported
    assert imported & NOT_FOR_JOBS == set()


def test_each_command_is_listed_with_the_module_that_defines_it() -> None:
    add_commands()
    defined: dict[str, list[str]] = {module: [] for module in MODULES}
    for command in app.registered_commands:
        assert command.callback is not None
        defined[command.callback.__module__].append(command.name or command.callback.__name__)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        first = (group.typer_instance.registered_commands)[0].callback
        assert first is not None
        defined[first.__module__].append(str(group.name))
    assert {module: sorted(names) for module, names in defined.items()} == {
        module: sorted(names) for module, names in MODULES.items()
    }
