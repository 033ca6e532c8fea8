"""What an installed copy holds: every file of every room, and a bare install that needs only its own few packages."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

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


def test_the_wheel_contains_exactly_the_files_of_the_packages(wheel: zipfile.ZipFile) -> None:
    rooms = [room.package for room in ROOMS if "." not in room.package]
    files = {path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_installs_the_zeta_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "zeta = zeta.cli:main" in wheel.read(entry_points).decode()


def test_a_bare_install_has_the_dependencies_of_client_and_cli() -> None:
    bare = {Requirement(text).name for text in project()["project"]["dependencies"]}
    (face,) = [room for room in ROOMS if room.package == "zeta"]
    (contract,) = [room for room in ROOMS if room.package == "zeta_core.contract"]
    comes_with_pydantic = {"pydantic_core"}
    assert (face.theirs | contract.theirs) - comes_with_pydantic == {IMPORT_NAMES.get(name, name) for name in bare}


USER_SCRIPT = """
from zeta import Client, Trainer

result = Trainer(model="org/name", dataset="rows.jsonl", max_steps=3)
print(result.checkpoint, result.train_loss)
with Client("http://127.0.0.1:8400", "key") as client:
    job = client.submit({"model": "org/name", "dataset": "rows.jsonl"}, on_upload=print)
    for event in client.events(job.id):
        print(event.seq, event.type)
    job = client.wait("@last")
    estimate = client.validate({"model": "org/name"})
    print(job.status, job.result, job.spec, estimate.parameters, client.jobs(), client.workers(), client.files())
    done = client.download(job.id, merged=True, on_progress=lambda progress: print(progress.bytes))
    print(done.directory, [file.sha256 for file in done.files], client.upload("rows.jsonl").id)
"""


def test_the_public_api_is_fully_typed(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    packages = {room.package for room in ROOMS if "." not in room.package}
    assert {f"{package}/py.typed" for package in packages} <= set(wheel.namelist())
    wheel.extractall(tmp_path / "installed")
    (tmp_path / "script.py").write_text(USER_SCRIPT)
    config = {
        "include": ["script.py"],
        "typeCheckingMode": "strict",
        "extraPaths": ["installed"],
        "venvPath": str(ROOT),
        "venv": ".venv",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--project", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout
