"""Checks the accessibility of pages with axe-core, and saves a picture of each page for people to look at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.harness.browser import AXE, AXE_INTEGRITY, Visitor
from tests.harness.npm_packages import npm_package

PICTURES = Path(__file__).parents[2] / "build" / "screenshots"
MAX_NAME = 100


class PageInspector:
    """Raises `NpmUnavailable` if axe-core can't be downloaded."""

    def __init__(self, cache: Path) -> None:
        self._axe = (npm_package(**AXE, integrity=AXE_INTEGRITY, cache=cache) / "axe.min.js").read_text()

    def inspect(self, visitor: Visitor, name: str) -> None:
        """Save a picture of the current page, and assert that axe has no serious finding."""
        save_picture(visitor, name)
        assert self.findings(visitor) == [], name

    def findings(self, visitor: Visitor) -> list[str]:
        """The serious and critical findings of axe on the current page."""
        visitor.page.evaluate(self._axe)
        result: dict[str, Any] = visitor.page.evaluate("axe.run({resultTypes: ['violations']})")
        return [
            f"{violation['id']} ({node['target']}): {node['failureSummary']}"
            for violation in result["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]


def save_picture(visitor: Visitor, name: str) -> None:
    """Save the whole page as build/screenshots/NAME.png; ``name`` may contain a folder, and any characters."""
    folder, _, title = name.partition(":")
    title = re.sub(r"(job|file|webhook)_\w+", r"\1", title)
    path = PICTURES / folder / (re.sub(r"[^\w]+", "-", title).strip("-")[:MAX_NAME] or "jobs")
    path.parent.mkdir(parents=True, exist_ok=True)
    visitor.page.screenshot(path=path.with_suffix(".png"), full_page=True)
