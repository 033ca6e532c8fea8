"""What an installed copy holds: every file of every room, and a bare install that needs only its own few packages."""

import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

from tests.harness.rooms import ROOMS
from tests.test_constraints import ROOT, project

IMPORT_NAMES = {"ruamel.yaml": "ruamel"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", target, ROOT], check=True, capture_output=True, timeout=100)
    (file,) = target.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_file_of_every_room_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    rooms = [room.package for room in ROOMS if "." not in room.package]
    files = {path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_makes_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "zeta = zeta.cli:main" in wheel.read(entry_points).decode()


def test_a_bare_install_has_all_that_the_client_and_the_command_import() -> None:
    bare = {Requirement(text).name for text in project()["project"]["dependencies"]}
    (face,) = [room for room in ROOMS if room.package == "zeta"]
    (contract,) = [room for room in ROOMS if room.package == "zeta_core.contract"]
    comes_with_pydantic = {"pydantic_core"}
    assert (face.theirs | contract.theirs) - comes_with_pydantic == {IMPORT_NAMES.get(name, name) for name in bare}
