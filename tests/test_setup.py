"""The set-up: deploy/install.py with uv and with pip, and what each make target installs."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from deploy.install import Unsupported, uv_settings
from tests.test_constraints import ROOT
from tests.test_distribution import entries_of

UV = shutil.which("uv", path=str(Path(sys.executable).parent))
NAME = "zeta-setup-test"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with one wheel, which no index has."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    stem = f"{NAME.replace('-', '_')}-1.0"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("zeta_setup_test.py", "")
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return folder


def install(environment: Path, config: Path, text: str) -> str:
    """Install the wheel into ``environment`` as make does, with this configuration of pip. Returns the output."""
    command = [sys.executable, "deploy/install.py", environment, NAME]
    config.write_text(text)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}  # noqa: TID251
    variables = {**others, "PIP_CONFIG_FILE": str(config), "UV_CACHE_DIR": str(config.with_name("uv-cache"))}
    done = subprocess.run(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert list(environment.glob("lib/python*/site-packages/zeta_setup_test.py")), done.stdout
    return done.stdout


def environment_with_pip(folder: Path) -> Path:
    """A virtual environment with links to the pip of this one."""
    venv.create(folder, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for package in entries_of(["pip"]):
        (site_packages / package.name).symlink_to(package)
    return folder


@pytest.mark.skipif(UV is None, reason="uv is not installed here; make setup installs it")
def test_uv_finds_the_packages_that_pip_is_configured_for(wheels: Path, tmp_path: Path) -> None:
    assert UV is not None
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "uv").symlink_to(UV)
    output = install(environment, tmp_path / "pip.conf", f"[global]\nno-index = true\nfind-links = {wheels}\n")
    assert "Installed 1 package" in output
    assert "pip" not in output


def test_pip_installs_if_uv_fails(wheels: Path, tmp_path: Path) -> None:
    environment = environment_with_pip(tmp_path / "environment")
    (environment / "bin" / "uv").symlink_to(shutil.which("false") or "/bin/false")
    output = install(environment, tmp_path / "pip.conf", f"[global]\nno-index = true\nfind-links = {wheels}\n")
    assert "uv failed; trying pip" in output
    assert f"Successfully installed {NAME}" in output


def test_pip_installs_if_uv_lacks_a_setting(wheels: Path, tmp_path: Path) -> None:
    environment = environment_with_pip(tmp_path / "environment")
    config = f"[global]\nno-index = true\nfind-links = {wheels}\n[install]\nreport = {tmp_path / 'report.json'}\n"
    output = install(environment, tmp_path / "pip.conf", config)
    assert "pip is configured with report = " in output
    assert f"Successfully installed {NAME}" in output
    assert not (environment / "bin" / "uv").exists()


# The output of `pip config list`.
PIP_CONFIG = r"""
:env:.cert='/own.pem'
:env:.timeout='7'
download.timeout='5'
global.cache-dir='/cache'
global.cert='/global.pem'
global.constraint='/a.txt /b.txt'
global.extra-index-url='\nhttp://two.invalid/a\nhttp://three.invalid'
global.index-url='http://one.invalid/simple'
global.proxy='http://proxy.invalid'
install.no-index='false'
install.pre='true'
install.trusted_host='one.invalid'
"""


def test_settings_of_pip_are_passed_on_to_uv() -> None:
    found = uv_settings(PIP_CONFIG)
    assert found.index == "http://one.invalid/simple"
    assert found.variables == {
        "UV_SYSTEM_CERTS": "1",
        "SSL_CERT_FILE": "/own.pem",
        "ALL_PROXY": "http://proxy.invalid",
        "UV_HTTP_TIMEOUT": "7",
    }
    assert set(zip(found.options[::2], found.options[1::2], strict=True)) == {
        ("--constraint", "/a.txt"),
        ("--constraint", "/b.txt"),
        ("--index", "http://two.invalid/a"),
        ("--index", "http://three.invalid"),
        ("--index-strategy", "unsafe-best-match"),
        ("--allow-insecure-host", "one.invalid"),
        ("--prerelease", "allow"),
    }


def test_an_unknown_setting_of_pip_rules_uv_out() -> None:
    with pytest.raises(Unsupported, match="platform = 'any'"):
        uv_settings("install.platform='any'")


def commands_of(target: str, folder: Path) -> str:
    """The commands that ``make target`` runs in a fresh clone."""
    command = ["make", "--dry-run", f"VENV={folder / 'environment'}", f"PYTHON={sys.executable}", target]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("target", ["demo", "serve"])
def test_demo_and_serve_install_only_what_they_need(target: str, tmp_path: Path) -> None:
    commands = commands_of(target, tmp_path)
    assert "'.[train,server,worker]'" in commands
    for word in ("--group", "postgres", "deepspeed", "s3"):
        assert word not in commands


def test_make_test_installs_everything(tmp_path: Path) -> None:
    commands = commands_of("test", tmp_path)
    for word in ("--group dev", "--group build", "postgres", "'.[deepspeed]'", "--group models"):
        assert word in commands
