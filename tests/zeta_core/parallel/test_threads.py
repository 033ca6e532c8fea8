"""The number of threads is set only if necessary, and a resumed run keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.models import plain
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import WarningLine


def test_the_number_of_threads_is_set_only_if_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    tell = torch.set_num_threads

    def tell_and_note(threads: int) -> None:
        told.append(threads)
        tell(threads)

    tell(2)
    monkeypatch.setattr(torch, "set_num_threads", tell_and_note)
    asked: dict[str, Any] = {"cache": tmp_path, "lr_scheduler": "constant"}
    train(plain, tmp_path / "out", max_steps=2, **asked)
    assert told == []  # to be told costs time, the same number, too

    tell(1)
    _, lines = train(plain, tmp_path / "out", max_steps=3, resume=True, **asked)
    assert told == [2, 1]  # as the run began, and as this process was
    warnings = {line.code: line.message for line in lines.all if isinstance(line, WarningLine)}
    assert "OMP_NUM_THREADS=2" in warnings["threads_changed"]
