"""The reference pages that are generated from the code. ``make docs`` writes them, and a test compares them with
it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.harness.reference_pages.commands import commands_page
from tests.harness.reference_pages.errors import errors_page
from tests.harness.reference_pages.events import events_page
from tests.harness.reference_pages.http_routes import http_page
from tests.harness.reference_pages.metrics import metrics_page
from tests.harness.reference_pages.python_client import python_page
from tests.harness.reference_pages.settings import settings_page
from tests.harness.reference_pages.spec import spec_page

DOCS = Path(__file__).parents[3] / "docs"

PAGES: Mapping[str, Callable[[], str]] = {
    "spec.md": spec_page,
    "settings.md": settings_page,
    "reference/command-line.md": commands_page,
    "reference/errors.md": errors_page,
    "reference/events.md": events_page,
    "reference/http.md": http_page,
    "reference/metrics.md": metrics_page,
    "reference/python.md": python_page,
}
