"""``deterministic``: the same seed gives the same bits, or the run ends with an error that names the operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.deterministic

from tests.zeta_core.models import PlainModel, llama
from tests.zeta_core.runs import train
from zeta_core.failures import CannotResume, CannotTrain

SETTINGS: Any = torch.utils.deterministic


class Recording(PlainModel):
    """Records the settings of torch in its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen.add(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                SETTINGS.fill_uninitialized_memory,
            )
        )
        return super().forward(ids)


class Overwriting(PlainModel):
    """Writes several values to the same place, whose order torch does not define."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        lost = torch.zeros(4).put_(torch.tensor([0, 0]), logits.detach().flatten()[:2])
        return logits + 0 * lost.sum()


@pytest.mark.extended
def test_deterministic_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": tmp_path, "max_steps": 4, "deterministic": True, "lr_scheduler": "constant"}
    models = [llama(attention_dropout=0.1) for _ in range(3)]
    _, lines = train(models[0], tmp_path / "one", **options)
    assert lines.resolved_spec["deterministic"] is True
    half: dict[str, Any] = {**options, "max_steps": 2}
    without: dict[str, Any] = {**options, "deterministic": False}
    train(models[1], tmp_path / "parts", **half)
    with pytest.raises(CannotResume, match="deterministic is False, but the run was started with True"):
        train(models[2], tmp_path / "parts", resume=True, **without)
    train(models[2], tmp_path / "parts", resume=True, **options)
    for one, resumed in zip(models[0].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(one, resumed)


def test_only_a_deterministic_run_restricts_torch_and_restores_it(tmp_path: Path) -> None:
    for deterministic, expected in ((True, (True, False, False)), (False, (False, False, True))):
        torch.manual_seed(0)
        model = Recording()
        train(model, tmp_path / str(deterministic), cache=tmp_path, max_steps=1, deterministic=deterministic)
        assert expected in model.seen
        assert not torch.are_deterministic_algorithms_enabled()
        assert SETTINGS.fill_uninitialized_memory


def test_an_operation_without_a_deterministic_kernel_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="deterministic is true, but the operation put_ of this model") as raised:
        train(Overwriting(), tmp_path / "out", cache=tmp_path, max_steps=1, deterministic=True)
    assert raised.value.patch == {"deterministic": False}
    train(Overwriting(), tmp_path / "out", cache=tmp_path, max_steps=1)
