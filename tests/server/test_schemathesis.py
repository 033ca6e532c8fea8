"""Schemathesis checks every route of a real service against its own description, ``/openapi.json``.

It sends requests that match the schema and ones that violate it, follows the links between routes, and checks status,
headers, content types and bodies. ``schemathesis.toml`` lists what a schema can't express.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.service import Service, running_service

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("schemathesis")
ALL_PHASES = "examples,coverage,fuzzing,stateful"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service") / "home", settings={"ZETA_HUB": "off"}) as running:
        yield running


def run(service: Service, folder: Path, *options: str) -> None:
    """Run schemathesis with all of its checks; nothing may fail."""
    done = subprocess.run(
        [
            *(str(COMMAND), "--config-file", str(ROOT / "schemathesis.toml"), "--no-color"),
            *("run", f"{service.url}/openapi.json", "--header", f"Authorization: Bearer {service.api_key}"),
            *("--checks", "all", "--continue-on-failure", "--suppress-health-check", "all"),
            *("--generation-database", "none", "--request-timeout", "60", *options),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    failures = done.stdout.partition("= FAILURES =")[2] or done.stdout[-3000:]
    assert done.returncode == 0, f"{failures[:6000]}\n{done.stderr[-2000:]}\n{service.log()}"
    with service.http() as http:
        assert http.get("/readyz").json()["status"] == "ok"


@pytest.mark.extended
def test_random_requests_and_sequences_are_answered_as_described(service: Service, tmp_path: Path) -> None:
    run(service, tmp_path, "--phases", "fuzzing,stateful", "--max-examples", "4", "--seed", "1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_value_at_a_boundary_is_answered_as_described(service: Service, tmp_path: Path) -> None:
    run(service, tmp_path, "--phases", ALL_PHASES, "--max-examples", "10", "--seed", "2")


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_many_random_requests_are_answered_as_described(service: Service, tmp_path: Path, seed: int) -> None:
    run(service, tmp_path, "--phases", ALL_PHASES, "--max-examples", "200", "--seed", str(seed))
