"""The number of threads is set only if necessary, and a resumed run keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.models import plain
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import WarningLine


@pytest.mark.extended
def test_the_number_of_threads_is_set_only_if_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    set_num_threads = torch.set_num_threads

    def record_call(threads: int) -> None:
        calls.append(threads)
        set_num_threads(threads)

    set_num_threads(2)
    monkeypatch.setattr(torch, "set_num_threads", record_call)
    options: dict[str, Any] = {"cache": tmp_path, "lr_scheduler": "constant"}
    train(plain, tmp_path / "out", max_steps=2, **options)
    assert calls == []  # setting the same number again costs time

    set_num_threads(1)
    _, lines = train(plain, tmp_path / "out", max_steps=3, resume=True, **options)
    assert calls == [2, 1]  # the number of the first run, then the number of this process again
    warnings = {line.code: line.message for line in lines.all if isinstance(line, WarningLine)}
    assert "OMP_NUM_THREADS=2" in warnings["threads_changed"]
