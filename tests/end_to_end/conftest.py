"""A running service, shared by the tests of this folder."""

from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser

from tests.end_to_end.inspected_pages import InspectedPages
from tests.harness.page_inspector import PageInspector
from tests.harness.service import Service, running_service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


@pytest.fixture
def inspected_pages(chromium: Browser, service: Service, inspector: PageInspector) -> InspectedPages:
    """Checks pages with axe-core; skips the test if it can't be downloaded."""
    return InspectedPages(chromium, service, inspector)
