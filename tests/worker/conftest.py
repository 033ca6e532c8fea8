"""An engine on SQLite, to which the tests add workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.fleet import SmallFleet, small_fleet


@pytest.fixture
def fleet(tmp_path: Path, redis_url: str) -> Iterator[SmallFleet]:
    with small_fleet(tmp_path, redis_url) as fleet:
        fleet.start_engine()
        yield fleet
