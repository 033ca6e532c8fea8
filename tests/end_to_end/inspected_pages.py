"""Checks a page of a real service in light and in dark, in windows that allow the script of axe."""

from collections.abc import Callable
from dataclasses import dataclass

from playwright.sync_api import Browser, Page

from tests.harness.browser import visiting
from tests.harness.page_inspector import PageInspector
from tests.harness.service import Service


@dataclass(frozen=True)
class InspectedPages:
    browser: Browser
    service: Service
    inspector: PageInspector

    def inspect(self, path: str, name: str, prepare: Callable[[Page], None]) -> None:
        """Open the page, bring it into the state to check with ``prepare``, and save its picture under ``name``."""
        for scheme in ("light", "dark"):
            with visiting(self.browser, self.service.url, color_scheme=scheme, bypass_csp=True) as visitor:
                visitor.page.goto(self.service.command("dashboard").stdout.strip())
                visitor.page.wait_for_url(f"{self.service.url}/")
                visitor.open(path)
                prepare(visitor.page)
                self.inspector.inspect(visitor, f"{scheme}:{name}")
