"""The documentation matches the code: generated pages, named files, links and settings."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.harness.deployment import ROOT, existing_settings
from tests.harness.reference_pages import DOCS
from tests.harness.reference_pages import PAGES as GENERATED_PAGES
from tests.harness.reference_pages.settings import settings_page, undescribed

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])
PATH = re.compile(
    r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|yml|txt|c|sh)|(?:zeta|zeta_core|server|worker|tests|docs)(?:/[\w-]+)*/?"
)
NO_SETTINGS = {
    *("ZETA_JOB_ID", "ZETA_ATTEMPT", "ZETA_RUN", "ZETA_FORK_SERVER", "ZETA_SANDBOX_ENTERED"),  # of our own processes
    *("ZETA_NAME", "ZETA_ENVIRONMENT"),  # an example, and a variable of the script for Slurm
}
NOT_OURS = {"script.py", "config.py", "README.md", "SPEC.yml"}  # files of users, and of libraries


@cache
def files_and_folders() -> list[str]:
    """Every path of this project, with a leading slash."""
    folders = [ROOT / name for name in ("zeta", "zeta_core", "server", "worker", "migrations", "tests", "benchmarks")]
    folders += [ROOT / "docs", ROOT / "deploy"]
    paths = [path for folder in folders for path in (folder, *folder.rglob("*")) if "__pycache__" not in path.parts]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    return [f"/{path.relative_to(ROOT)}" for path in paths]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """A path may be shortened to its end, such as `engine/scheduler.py`."""
    names = {name for name in re.findall(r"`([^`\n]+)`", page.read_text()) if PATH.fullmatch(name)} - NOT_OURS
    missing = [name for name in names if not any(path.endswith(f"/{name.rstrip('/')}") for path in files_and_folders())]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if not re.match(r"https?:|mailto:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("name", GENERATED_PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == GENERATED_PAGES[name](), "run `make docs`"


@pytest.mark.extended
def test_the_site_has_no_broken_links_and_no_pages_outside_its_navigation(tmp_path: Path) -> None:
    """Warnings of Sphinx are errors."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", tmp_path / "cache"]
    done = subprocess.run([*command, DOCS, tmp_path / "site"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 60
    elsewhere = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//")
    assert [page.name for page in pages if elsewhere.search(page.read_text())] == [], "loads files from other sites"


def test_the_page_of_settings_describes_every_setting() -> None:
    assert undescribed() == [], "give these settings a description"
    listed = set(re.findall(r"^\| `ZETA_([A-Z0-9_]+)`", settings_page(), re.MULTILINE))
    settings = {name.removeprefix("ZETA_") for name in existing_settings() if not name.endswith("_FILE")}
    assert settings - listed == {"CUDA_VISIBLE_DEVICES"}, "its name has no prefix"
    assert listed - settings == set()


def test_every_variable_that_the_code_or_a_page_names_is_a_setting() -> None:
    named = {
        (path.relative_to(ROOT), name)
        for folder in ("zeta", "zeta_core", "server", "worker", "migrations", "deploy", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".sh", ".yaml", ".yml", ".service", ".sbatch", ".html")
        for name in re.findall(r"\bZETA_[A-Z0-9_]*[A-Z0-9]\b", path.read_text())
    }
    known = existing_settings() | NO_SETTINGS | {f"{name}_FILE" for name in existing_settings()}
    assert {(path, name) for path, name in named if name not in known} == set()


def test_every_decision_page_has_the_same_form() -> None:
    for page in ROOT.glob("docs/decisions/*.md"):
        text = page.read_text()
        title, *headings = re.findall(r"^#+ .*", text, re.MULTILINE)
        assert title.startswith(f"# {page.name[:4]} · "), page.name
        assert headings == ["## Context", "## Decision", "## Consequences"], page.name
