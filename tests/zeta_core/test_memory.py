"""The micro-batch that fits, and activations that are computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.zeta_core.models import PlainModel, llama, plain
from zeta import Trainer
from zeta_core.activation import checkpointed, repeated_blocks


class Small(PlainModel):
    """Runs out of memory, as a GPU says it, with more than three sequences at once."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(ids)


def test_the_micro_batch_is_halved_until_it_fits_and_the_split_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    small = Small(dropout=0.1)
    found = Trainer(model=small, seq_len=32, max_steps=2, output_dir=tmp_path / "small")
    assert "batch_size is 2 and gradient_accumulate_every 16 from here on" in capsys.readouterr().out
    torch.manual_seed(0)
    split: dict[str, Any] = {"batch_size": 2, "gradient_accumulate_every": 16}
    given = Trainer(model=PlainModel(dropout=0.1), seq_len=32, max_steps=2, output_dir=tmp_path / "given", **split)
    assert found.train_loss == given.train_loss, "the step was computed again with the same random numbers"
    state = json.loads((tmp_path / "small" / "final" / "training_state" / "state.json").read_text())
    assert {name: state["plan"][name] for name in split} == split
    again = Trainer(
        model=small, seq_len=32, max_steps=3, output_dir=tmp_path / "small", resume_from_checkpoint=tmp_path / "small"
    )
    assert again.steps_trained == 1
    assert "Memory ran out" not in capsys.readouterr().out


def test_a_split_that_was_asked_for_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(model=Small(), seq_len=32, max_steps=1, batch_size=4, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "build", [lambda: plain(dropout=0.3), lambda: llama(attention_dropout=0.3)], ids=["plain", "llama"]
)
def test_recomputed_activations_give_the_same_gradient_with_dropout(build: object) -> None:
    assert callable(build)
    gradients: list[torch.Tensor] = []
    for recompute in (False, True):
        model = build()
        assert isinstance(model, nn.Module)
        blocks = repeated_blocks(model)
        assert len(blocks) == 2
        torch.manual_seed(1)
        ids = torch.randint(3, 300, (2, 16))
        with checkpointed(blocks if recompute else []):
            answer = model(ids)
            getattr(answer, "logits", answer).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1])


def test_a_module_without_repeated_blocks_is_one_block() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    assert repeated_blocks(model) == [model]
