"""``checkpointing_steps="epoch"``: the steps at which epochs end, and resuming from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.zeta_core.models import plain
from tests.zeta_core.runs import train


def test_a_checkpoint_follows_each_epoch_and_resumes_exactly(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of a small text.\n" for number in range(50)))  # 39 sequences, 9.75 steps
    options: dict[str, Any] = {"dataset": {"path": str(text)}, "epochs": 3, "checkpointing_steps": "epoch"}
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    outcome, _ = train(plain(dropout=0.1), straight, cache=tmp_path, save_total_limit=5, **options)
    assert outcome.total_steps == 30
    assert {path.name for path in straight.glob("step-*")} == {"step-10", "step-20", "step-30"}

    first = parts / "step-10"
    stopped, _ = train(
        plain(dropout=0.1), parts, cache=tmp_path, stop=lambda: "cancel" if first.is_dir() else None, **options
    )
    assert stopped.stopped == "cancel"
    resumed, _ = train(plain(dropout=0.1), parts, cache=tmp_path, resume=True, **options)
    assert resumed.steps_trained in (10, 20)
    assert resumed.progress.loss_sum == outcome.progress.loss_sum
    files = [(folder / "final" / "model.safetensors").read_bytes() for folder in (straight, parts)]
    assert files[0] == files[1]
