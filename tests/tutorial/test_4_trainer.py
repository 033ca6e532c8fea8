"""Lesson 4: use the Trainer without a service."""

from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.end_to_end.specs import TINY_LLAMA
from zeta import Trainer

MODEL: dict[str, Any] = {"config": TINY_LLAMA}  # or an nn.Module, a Hub id, a local folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of tokenized data in the folder of the test."""
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))


def weights(checkpoint: Path | None) -> bytes:
    assert checkpoint is not None
    return (checkpoint / "model.safetensors").read_bytes()


def test_train_with_one_call(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The tide follows the moon.\n" * 500)
    result = Trainer(model=MODEL, dataset=tmp_path / "text.txt", seq_len=64, max_steps=3, output_dir=tmp_path / "out")
    assert result.steps == 3
    assert result.checkpoint == tmp_path / "out" / "final"


@pytest.mark.extended
def test_resume_a_run_with_a_bit_identical_result(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": MODEL, "seq_len": 64, "batch_size": 2, "checkpointing_steps": 2}
    uninterrupted = Trainer(**options, max_steps=4, lr_scheduler="constant", output_dir=tmp_path / "one")
    Trainer(**options, max_steps=2, lr_scheduler="constant", output_dir=tmp_path / "two")
    resumed = Trainer(
        **options,
        max_steps=4,
        lr_scheduler="constant",
        resume_from_checkpoint=tmp_path / "two" / "checkpoint.pt",
        output_dir=tmp_path / "two",
    )
    assert resumed.steps_trained == 2
    assert weights(uninterrupted.checkpoint) == weights(resumed.checkpoint)


def test_train_on_token_ids(tmp_path: Path) -> None:
    numpy.save(tmp_path / "ids.npy", numpy.arange(2000, dtype=numpy.uint16) % 384)
    data: dict[str, Any] = {"dataset": tmp_path / "ids.npy", "use_pretokenized": True}
    result = Trainer(model=MODEL, **data, seq_len=64, batch_size=2, max_steps=2, output_dir=tmp_path / "out")
    assert result.steps == 2
