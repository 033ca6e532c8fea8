"""Mean token accuracy: the share of trained or held-out tokens that the model predicts, in training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.zeta_core.models import WithLabels, llama, plain
from tests.zeta_core.runs import RecordedLines, train
from zeta_core.contract.job.events import ProgressLine

TEXTS = ["The quick brown fox jumps over the lazy dog. "[:length] for length in (40, 33, 7, 25)]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {"path": str(path)}


def by_hand(model: nn.Module) -> float:
    """The share of all tokens with a predecessor in their document that are predicted, one document at a time."""
    num_correct = num_targets = 0
    model.eval()
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([[byte + 3 for byte in text.encode()] + [1]])
            answer: Any = model(ids)
            logits = getattr(answer, "logits", answer)[0]
            num_correct += int((logits[:-1].argmax(-1) == ids[0, 1:]).sum())
            num_targets += ids.shape[1] - 1
    return num_correct / num_targets


def progress(lines: RecordedLines) -> list[ProgressLine]:
    return [line for line in lines.all if isinstance(line, ProgressLine) and line.step is not None]


@pytest.mark.parametrize("model", [llama, plain])
@pytest.mark.parametrize("split", [{"batch_size": 4}, {"batch_size": 1, "gradient_accumulate_every": 4}])
def test_the_accuracy_equals_that_of_a_computation_by_hand(
    model: Any, split: dict[str, Any], data: dict[str, str], tmp_path: Path
) -> None:
    trained = model()
    before = by_hand(trained)
    options: dict[str, Any] = {"dataset": data, "eval_dataset": data, "pack": False, "seq_len": 64, "eval_steps": 1}
    _, lines = train(
        trained, tmp_path / "out", cache=tmp_path / "cache", max_steps=1, learning_rate=0.01, **options, **split
    )
    (step,) = [line.token_accuracy for line in progress(lines) if line.loss is not None]
    (evaluated,) = [line.eval_token_accuracy for line in progress(lines) if line.eval_loss is not None]
    assert step == pytest.approx(before, abs=1e-12)
    assert evaluated == pytest.approx(by_hand(trained), abs=1e-12)


def test_a_memorized_text_is_predicted_completely(data: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": data, "eval_dataset": data, "pack": False, "seq_len": 64, "batch_size": 4}
    _, lines = train(llama(), tmp_path / "out", cache=tmp_path / "cache", max_steps=80, learning_rate=0.02, **options)
    evaluated = [line.eval_token_accuracy for line in progress(lines) if line.eval_loss is not None]
    assert evaluated[-1] is not None
    assert evaluated[-1] > 0.9


def test_a_model_that_returns_only_its_loss_has_no_accuracy(data: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": data, "eval_dataset": data, "pack": False, "seq_len": 64, "batch_size": 4}
    _, lines = train(WithLabels(), tmp_path / "out", cache=tmp_path / "cache", max_steps=2, **options)
    assert {line.token_accuracy for line in progress(lines)} == {None}
    assert {line.eval_token_accuracy for line in progress(lines)} == {None}
