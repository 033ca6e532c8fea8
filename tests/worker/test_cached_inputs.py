"""A worker remembers the inputs of its last jobs, also after a restart, and reports a limited number of them."""

import json
import time
from pathlib import Path

from worker.artifacts.cached_inputs import CachedInputs
from worker.artifacts.cleanup import CACHE_RETENTION_SECONDS
from zeta_core.contract.wire.messages import MAX_CACHED_INPUTS


def test_inputs_are_remembered_after_a_restart_until_the_cache_is_emptied(tmp_path: Path) -> None:
    file = tmp_path / "cached_inputs.json"
    inputs = CachedInputs(file)
    inputs.add(["a" * 12])
    inputs.add(["b" * 12, "a" * 12])
    assert CachedInputs(file).keys == inputs.keys == ("b" * 12, "a" * 12)
    inputs.clear()
    assert CachedInputs(file).keys == ()


def test_only_the_newest_inputs_are_kept_and_old_ones_expire(tmp_path: Path) -> None:
    file = tmp_path / "cached_inputs.json"
    now, old, recent = time.time(), "0" * 12, "f" * 12
    file.write_text(json.dumps({old: now - CACHE_RETENTION_SECONDS - 1, recent: now - 60}))
    inputs = CachedInputs(file)
    assert inputs.keys == (recent,)
    inputs.add([f"{number:012x}" for number in range(MAX_CACHED_INPUTS)])
    assert len(inputs.keys) == MAX_CACHED_INPUTS
    assert recent not in inputs.keys


def test_a_damaged_file_only_loses_the_preference(tmp_path: Path) -> None:
    file = tmp_path / "cached_inputs.json"
    for content in (b"", b"[1]", b'{"aaaaaaaaaaaa": "x"}', b'{"a": 1e300}', b"\xff"):
        file.write_bytes(content)
        assert CachedInputs(file).keys == ()
