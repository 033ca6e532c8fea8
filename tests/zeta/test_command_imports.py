"""What a command imports, which decides how fast it starts. `benchmarks/command_line.py` measures the time."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.harness.service import clean_environment
from zeta.cli.app import app
from zeta.cli.entry_point import MODULES, add_commands

NOT_FOR_HELP = frozenset({"httpx", "pydantic", "rich", "ruamel", "zeta.client", "zeta_core.contract.errors", "asyncio"})
NOT_FOR_JOBS = frozenset(
    {"rich.console", "click", "pygments", "ruamel", "torch", "tarfile", "httpx_sse"}
    | {"zeta.download", "zeta.upload", "zeta.local_inputs", "zeta.spec_file", "zeta.event_stream", "zeta.log_stream"}
    | {"zeta.cli.submit", "zeta.cli.failures"}
    | {"zeta_core.contract.spec.job_spec", "zeta_core.contract.spec.options", "zeta_core.contract.spec.sources"}
    | {"zeta_core.contract.job.events", "zeta_core.contract.job.estimate", "zeta_core.contract.wire.messages"}
)


class _EmptyService(BaseHTTPRequestHandler):
    """Responds to every request with an empty list, as a service without jobs."""

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [], "has_more": False}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Request-Id", "req_1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server_url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _EmptyService) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


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


def test_listing_jobs_imports_nothing_of_other_commands(environment: dict[str, str], server_url: str) -> None:
    output, imported = imports_of({**environment, "ZETA_URL": server_url}, "jobs")
    assert output == "No jobs found.\n"
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
