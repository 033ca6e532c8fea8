"""Imports point one way: every room imports only what its line of the table allows, and loads nothing it must not.

The table is `tests/harness/rooms.py`. Each check is also shown to fail on a room made to break it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.rooms import FLOORS, ROOMS, Room, import_cycle, upward_imports, violations

ROOT = Path(__file__).parents[1]

# Imports every module of a package but the listed ones, and prints which of the named modules that loaded.
LOAD_A_ROOM = """
import importlib, pkgutil, sys
package, skipped, never = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
room = importlib.import_module(package)
for module in pkgutil.walk_packages(room.__path__, f"{package}."):
    if module.name not in skipped and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*[name for name in never if name in sys.modules])
"""
# `zeta.trainer` is the door to the training core, which nothing opens but `zeta.Trainer`; Alembic alone runs env.py.
NOT_LOADED = "zeta.trainer,migrations.env"


def test_every_import_of_every_room_keeps_to_the_table() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize("package", FLOORS)
def test_the_parts_of_a_room_with_floors_import_downwards_only(package: str) -> None:
    assert upward_imports(ROOT, package) == []


@pytest.mark.parametrize("package", FLOORS)
def test_the_modules_of_a_package_import_each_other_without_cycles(package: str) -> None:
    assert import_cycle(ROOT, package) == []


def test_an_import_cycle_is_found(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server/jobs.py").write_text("from server import files\n")
    (tmp_path / "server/files.py").write_text("def late():\n    from server.jobs import find\n")
    assert set(import_cycle(tmp_path, "server")) == {"server.jobs", "server.files"}


def test_an_import_that_points_up_and_a_part_without_a_floor_are_told(tmp_path: Path) -> None:
    core = tmp_path / "zeta_core"
    for part in ("data", "model", "elsewhere"):
        (core / part).mkdir(parents=True)
    (core / "data/rows.py").write_text("from zeta_core.contract import spec\nfrom zeta_core.model import sources\n")
    (core / "model/sources.py").write_text("from zeta_core import objective\nfrom zeta_core.data import rows\n")
    (core / "elsewhere/more.py").write_text("import json\n")
    assert upward_imports(tmp_path, "zeta_core") == [
        "zeta_core/data/rows.py:2: data imports model, which is not below it.",
        "zeta_core.elsewhere stands on no floor.",
        "zeta_core/model/sources.py:1: model imports objective, which is not below it.",
    ]


def test_every_package_that_is_shipped_is_a_room() -> None:
    shipped = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert shipped == {room.package for room in ROOMS if "." not in room.package}


@pytest.mark.parametrize("room", [room for room in ROOMS if room.package != "zeta_core"], ids=lambda room: room.package)
def test_importing_a_room_loads_nothing_that_it_must_never_know(room: Room) -> None:
    command = [sys.executable, "-c", LOAD_A_ROOM, room.package, NOT_LOADED, ",".join(sorted(room.never))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_check_of_what_is_loaded_can_fail() -> None:
    command = [sys.executable, "-c", LOAD_A_ROOM, "zeta_core.contract", NOT_LOADED, "pydantic,torch"]
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
def test_an_import_against_the_table_is_told_with_its_file_and_line(
    tmp_path: Path, file: str, source: str, expected: str
) -> None:
    _build_rooms(tmp_path)
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(source)
    (found,) = violations(tmp_path)
    assert expected in found
    assert found.startswith(f"{file}:")


def test_what_the_table_allows_is_no_violation(tmp_path: Path) -> None:
    _build_rooms(tmp_path)
    (tmp_path / "zeta/trainer.py").write_text("def train():\n    from zeta_core.trainer import Trainer\n")
    (tmp_path / "server/jobs.py").write_text("from zeta_core.contract import job\nimport fastapi, json\n")
    (tmp_path / "migrations/env.py").write_text("from alembic import context\nfrom server.database.tables import Job\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_room_that_is_missing_or_empty_is_no_room_that_keeps_the_rules(tmp_path: Path, state: str) -> None:
    _build_rooms(tmp_path)
    (tmp_path / "worker/module.py").unlink()
    if state == "missing":
        (tmp_path / "worker").rmdir()
    else:
        (tmp_path / "worker/__init__.py").write_text('"""Nothing yet."""\n')
    with pytest.raises(AssertionError, match="the room worker is missing or empty"):
        violations(tmp_path)


def _build_rooms(root: Path) -> None:
    for room in ROOMS:
        directory = root.joinpath(*room.package.split("."))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "module.py").write_text("import json\n")
