"""Every package imports only what `tests/harness/import_rules.py` allows, and loads no forbidden module.

Each check is also shown to fail on a package that breaks the rules.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.import_rules import LAYERS, PACKAGES, Package, import_cycle, upward_imports, violations

ROOT = Path(__file__).parents[1]

# Imports every module of a package except the skipped ones, and prints the forbidden modules that this loaded.
LOAD_A_PACKAGE = """
import importlib, pkgutil, sys
name, skipped, forbidden = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
package = importlib.import_module(name)
for module in pkgutil.walk_packages(package.__path__, f"{name}."):
    if module.name not in skipped and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*[module for module in forbidden if module in sys.modules])
"""
# Only `zeta.Trainer` imports `zeta.trainer`, which loads the training core; only Alembic runs env.py.
NOT_LOADED = "zeta.trainer,migrations.env"


def test_every_import_follows_the_rules() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize("name", LAYERS)
def test_modules_import_only_from_lower_layers(name: str) -> None:
    assert upward_imports(ROOT, name) == []


@pytest.mark.parametrize("name", LAYERS)
def test_the_modules_of_a_package_have_no_import_cycle(name: str) -> None:
    assert import_cycle(ROOT, name) == []


def test_an_import_cycle_is_found(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server/jobs.py").write_text("from server import files\n")
    (tmp_path / "server/files.py").write_text("def late():\n    from server.jobs import find\n")
    assert set(import_cycle(tmp_path, "server")) == {"server.jobs", "server.files"}


def test_upward_imports_and_modules_without_a_layer_are_reported(tmp_path: Path) -> None:
    core = tmp_path / "zeta_core"
    for part in ("data", "model", "elsewhere"):
        (core / part).mkdir(parents=True)
    (core / "data/rows.py").write_text("from zeta_core.contract import spec\nfrom zeta_core.model import sources\n")
    (core / "model/sources.py").write_text("from zeta_core import objective\nfrom zeta_core.data import rows\n")
    (core / "elsewhere/more.py").write_text("import json\n")
    assert upward_imports(tmp_path, "zeta_core") == [
        "zeta_core/data/rows.py:2: data imports model, which is not in a lower layer.",
        "zeta_core.elsewhere has no layer.",
        "zeta_core/model/sources.py:1: model imports objective, which is not in a lower layer.",
    ]


def test_every_shipped_package_has_rules() -> None:
    shipped = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert shipped == {package.name for package in PACKAGES if "." not in package.name}


@pytest.mark.parametrize(
    "package", [package for package in PACKAGES if package.name != "zeta_core"], ids=lambda p: p.name
)
def test_importing_a_package_loads_no_forbidden_module(package: Package) -> None:
    command = [sys.executable, "-c", LOAD_A_PACKAGE, package.name, NOT_LOADED, ",".join(sorted(package.forbidden))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_check_for_forbidden_modules_can_fail() -> None:
    command = [sys.executable, "-c", LOAD_A_PACKAGE, "zeta_core.contract", NOT_LOADED, "pydantic,torch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["pydantic"]


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("server/jobs.py", "import os\nimport torch\n", "server/jobs.py:2: server imports torch;"),
        ("server/jobs.py", "def late():\n    from worker import app\n", "server/jobs.py:2: server imports worker.app;"),
        ("server/jobs.py", "from zeta_core import data\n", "server/jobs.py:1: server imports zeta_core.data;"),
        (
            "server/jobs.py",
            "from importlib import import_module\nimport_module('torch.nn')\n",
            "server imports torch.nn;",
        ),
        (
            "worker/tasks.py",
            "from ..server.database import connections\n",
            "worker/tasks.py:1: worker imports server.database.connections;",
        ),
        ("worker/tasks.py", "from sqlalchemy import select\n", "worker imports sqlalchemy;"),
        ("zeta/client.py", "import zeta_core.train\n", "zeta imports zeta_core.train;"),
        ("zeta_core/data.py", "from redis import Redis\n", "zeta_core imports redis;"),
        ("zeta_core/contract/jobs.py", "from zeta_core import data\n", "zeta_core.contract imports zeta_core.data;"),
        ("zeta_core/contract/jobs.py", "import fastapi\n", "zeta_core.contract imports fastapi;"),
        ("migrations/env.py", "from server import jobs\n", "migrations imports server.jobs;"),
    ],
)
def test_a_forbidden_import_is_reported_with_its_file_and_line(
    tmp_path: Path, file: str, source: str, expected: str
) -> None:
    _build_packages(tmp_path)
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(source)
    (found,) = violations(tmp_path)
    assert expected in found
    assert found.startswith(f"{file}:")


def test_allowed_imports_are_not_reported(tmp_path: Path) -> None:
    _build_packages(tmp_path)
    (tmp_path / "zeta/trainer.py").write_text("def train():\n    from zeta_core.trainer import Trainer\n")
    (tmp_path / "server/jobs.py").write_text("from zeta_core.contract import job\nimport fastapi, json\n")
    (tmp_path / "migrations/env.py").write_text("from alembic import context\nfrom server import settings\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_missing_or_empty_package_is_reported(tmp_path: Path, state: str) -> None:
    _build_packages(tmp_path)
    (tmp_path / "worker/module.py").unlink()
    if state == "missing":
        (tmp_path / "worker").rmdir()
    else:
        (tmp_path / "worker/__init__.py").write_text('"""Empty."""\n')
    with pytest.raises(AssertionError, match="the package worker is missing or empty"):
        violations(tmp_path)


def _build_packages(root: Path) -> None:
    for package in PACKAGES:
        directory = root.joinpath(*package.name.split("."))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "module.py").write_text("import json\n")
