"""A real browser: Debian's Chromium, driven by Playwright. It records what a page must not do."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
AXE = {"name": "axe-core", "version": "4.14.1"}
AXE_INTEGRITY = "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="


class BrowserUnavailable(Exception):
    """There is no Chromium on this machine."""


@contextmanager
def running_browser() -> Generator[Browser]:
    """Run Chromium without a window. Raises `BrowserUnavailable`."""
    executable = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if executable is None:
        raise BrowserUnavailable("there is no Chromium here; install it with `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visitor:
    """A browser window at a service. ``faults`` are errors in the console, and ``foreign`` requests to other sites."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list[str])
    foreign: list[str] = field(default_factory=list[str])

    def open(self, path: str) -> None:
        self.page.goto(self.url + path)

    def log_in(self, key: str) -> None:
        self.open("/login")
        self.page.fill("#key", key)
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(f"{self.url}/")

    def check(self) -> None:
        """Assert that no page had an error, violated the Content-Security-Policy, or asked another site."""
        assert (self.faults, self.foreign) == ([], [])


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Generator[Visitor]:
    """A new window with its own cookies; ``options`` are those of a Playwright context, such as ``color_scheme``."""
    settings: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, **options}
    context = browser.new_context(**settings)
    visitor = Visitor(context.new_page(), url)

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and "favicon" not in str(message.location):
            visitor.faults.append(f"{message.type} at {visitor.page.url}: {message.text}")

    def on_request(request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob", "about") and address.netloc != urlsplit(url).netloc:
            visitor.foreign.append(request.url)

    visitor.page.on("console", on_console)
    visitor.page.on("pageerror", lambda error: visitor.faults.append(f"exception at {visitor.page.url}: {error}"))
    visitor.page.on("request", on_request)
    try:
        yield visitor
    finally:
        context.close()
