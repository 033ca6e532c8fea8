"""The distribution: the files of the wheel, its dependencies, and installed copies that work outside the repository."""

import json
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.harness.children import start_child, stop_child
from tests.harness.import_rules import PACKAGES
from tests.harness.service import clean_environment
from tests.harness.waiting import wait_until
from tests.test_constraints import ROOT, closure, project
from zeta.up.home import Home

IMPORT_NAMES = {"httpx-sse": "httpx_sse", "ruamel.yaml": "ruamel", "typing-extensions": "typing_extensions"}


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", target, ROOT], check=True, capture_output=True, timeout=100)
    (file,) = target.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


def install(wheel_file: Path, folder: Path, packages: Iterable[Path]) -> Path:
    """Install the wheel in a new virtual environment with links to ``packages``, and return its folder of commands.

    ``packages`` are entries of this environment's site-packages.
    """
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for package in packages:
        (site_packages / package.name).symlink_to(package)
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*command, wheel_file], check=True, capture_output=True, timeout=100)
    return folder / "bin"


def entries_of(distributions: Iterable[str]) -> set[Path]:
    """The entries in site-packages that belong to these installed distributions."""
    site_packages = Path(sysconfig.get_path("purelib"))
    files = [file for name in distributions for file in metadata.distribution(name).files or ()]
    return {site_packages / file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}


def dependencies_of_all() -> set[str]:
    """The distributions that `pip install 'zeta-train[all]'` installs on this machine, besides ours."""
    table = project()["project"]
    extras = table["optional-dependencies"]
    chosen = Requirement(extras["all"][0]).extras
    texts = [*table["dependencies"], *(text for extra in chosen for text in extras[extra])]
    seen: set[str] = set()
    return {name for text in texts for name in closure(Requirement(text), seen)}


def test_the_wheel_contains_exactly_the_files_of_the_packages(wheel: zipfile.ZipFile) -> None:
    names = [package.name for package in PACKAGES if "." not in package.name]
    files = {path for name in names for path in (ROOT / name).rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_installs_the_zeta_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "zeta = zeta.cli:main" in wheel.read(entry_points).decode()


def test_a_bare_install_has_the_dependencies_of_client_and_cli() -> None:
    bare = {Requirement(text).name for text in project()["project"]["dependencies"]}
    (public,) = [package for package in PACKAGES if package.name == "zeta"]
    (contract,) = [package for package in PACKAGES if package.name == "zeta_core.contract"]
    # pydantic_core is part of pydantic; pandas is used if the user has installed it.
    assert (public.third_party | contract.third_party) - {"pydantic_core", "pandas"} == {
        IMPORT_NAMES.get(name, name) for name in bare
    }


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
    packages = {package.name for package in PACKAGES if "." not in package.name}
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


@pytest.mark.extended
def test_the_client_works_with_the_bare_dependencies_only(wheel_file: Path, tmp_path: Path) -> None:
    seen: set[str] = set()
    bare = {name for text in project()["project"]["dependencies"] for name in closure(Requirement(text), seen)}
    commands = install(wheel_file, tmp_path / "venv", entries_of(bare))
    environment = clean_environment() | {"HOME": str(tmp_path), "ZETA_URL": "http://127.0.0.1:1"}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    helped = run(commands / "zeta", "--help")
    assert (helped.returncode, "submit" in helped.stdout) == (0, True), helped.stderr
    unreachable = run(commands / "zeta", "jobs", "--json")
    assert (unreachable.returncode, json.loads(unreachable.stderr)["error"]["code"]) == (4, "unreachable")
    incomplete = run(commands / "zeta", "up", "--home", tmp_path / "home")
    assert (incomplete.returncode, "pip install 'zeta-train[train,server,worker]'" in incomplete.stderr) == (2, True)


TRAINER_SCRIPT = """
import migrations, server, worker, zeta, zeta_core
from zeta import Trainer

print(*(package.__file__ for package in (migrations, server, worker, zeta, zeta_core)))
config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "vocab_size": 384}
print(Trainer(model={"config": config}, tokenizer={"builtin": "bytes"}, seq_len=32, batch_size=2, max_steps=2).steps)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_wheel_with_all_extras_serves_submits_and_trains_outside_the_repository(
    wheel_file: Path, tmp_path: Path
) -> None:
    commands = install(wheel_file, tmp_path / "venv", entries_of(dependencies_of_all()))
    home = Home(tmp_path / "home")
    environment = clean_environment() | {"HOME": str(tmp_path), "ZETA_HOME": str(home.path), "HF_HUB_OFFLINE": "1"}

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def is_ready() -> bool:
        assert service.poll() is None, (tmp_path / "up.log").read_text()
        state = home.running()
        return state is not None and state.state == "ready"

    up = [commands / "zeta", "up", "--port", "0"]
    service = start_child(up, log_file=tmp_path / "up.log", environment=environment)
    try:
        wait_until(is_ready, 150, "the installed service to be ready")
        (tmp_path / "job.yaml").write_text(
            "model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,"
            " num_attention_heads: 2, vocab_size: 384}}\n"
            "dataset: python-docs\ntokenizer: {builtin: bytes}\nseq_len: 32\nbatch_size: 2\nmax_steps: 2\n"
        )
        assert "succeeded" in run(commands / "zeta", "submit", "job.yaml", "--follow")
        run(commands / "zeta", "download", "@last", "-o", "model")
        assert (tmp_path / "model" / "model.safetensors").is_file()
    finally:
        status = stop_child(service, stop_signal=signal.SIGTERM)
    assert status == 0, (tmp_path / "up.log").read_text()

    files, *_, steps = run(commands / "python", "-c", TRAINER_SCRIPT).splitlines()
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in files.split()), files
    assert steps == "2"
