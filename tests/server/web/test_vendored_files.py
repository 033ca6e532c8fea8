"""The vendored files are those that npm publishes, are small, and come with their licences."""

import base64
import hashlib
import json
from typing import Any

import pytest

from server.web.assets import FOLDER
from tests.harness.npm_packages import NpmUnavailable, npm_package

VENDOR = FOLDER / "vendor"
PACKAGES: list[dict[str, Any]] = json.loads((VENDOR / "packages.json").read_text())


def test_the_vendored_files_are_recorded_and_small() -> None:
    recorded = {name for package in PACKAGES for name in package["files"]}
    assert {file.name for file in VENDOR.iterdir()} == recorded | {"packages.json"}
    assert sum(file.stat().st_size for file in VENDOR.iterdir()) < 120_000


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package["package"])
def test_a_vendored_package_has_its_licence_and_the_recorded_content(package: dict[str, Any]) -> None:
    assert [name for name in package["files"] if name.endswith(".LICENSE")]
    for name, file in package["files"].items():
        digest = hashlib.sha512((VENDOR / name).read_bytes()).digest()
        assert base64.b64encode(digest).decode() == file["sha512"], name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package["package"])
def test_the_vendored_files_equal_those_that_npm_publishes(
    package: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    cache = pytestconfig.cache
    assert cache is not None
    try:
        published = npm_package(package["package"], package["version"], package["integrity"], cache.mkdir("npm"))
    except NpmUnavailable as reason:
        pytest.skip(str(reason))
    for name, file in package["files"].items():
        assert (VENDOR / name).read_bytes() == (published / file["path"]).read_bytes(), name
