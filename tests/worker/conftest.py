"""An engine on SQLite beside a worker of small trainings."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.fleet import Bench, bench


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[Bench]:
    with bench(tmp_path, redis_url) as made:
        made.start_engine()
        yield made
