"""Compiled blocks train like others: on one device, sharded, with activation checkpointing, and resumed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.runtime import cache_dir_utils

from tests.zeta_core.models import llama
from zeta import Trainer
from zeta_core import environment
from zeta_core.failures import CannotTrain
from zeta_core.model import compilation

SETTINGS: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "learning_rate": 1e-2, "lr_scheduler": "constant"}
LACKING = compilation.missing_requirement()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.skipif(LACKING is not None, reason=f"torch.compile needs {LACKING}")
def test_compiled_blocks_train_the_same_and_resume_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))

    def train(name: str, steps: int = 3, *, dropout: float = 0.0, **more: Any) -> tuple[float, torch.Tensor]:
        model = llama(attention_dropout=dropout)
        result = Trainer(model=model, max_steps=steps, output_dir=tmp_path / name, **{**SETTINGS, **more})
        assert result.train_loss is not None
        return result.train_loss, weights(model)

    counters.clear()
    eager, _ = train("eager")
    assert counters["stats"]["unique_graphs"] == 0
    whole, straight = train("compiled", compile=True)
    assert counters["stats"]["unique_graphs"] >= 1, "torch compiled no graph"
    assert counters["inductor"], "no kernel was generated for the graphs"
    compiled = tmp_path / "home" / "cache" / environment.COMPILED_CODE
    assert any(compiled.iterdir()), "kernels are kept in the home, not in a predictable folder of /tmp"
    assert "The first step compiles 2 x LlamaDecoderLayer" in (output := capsys.readouterr().out)
    assert "The first step, including compilation, took" in output
    assert whole == pytest.approx(eager, abs=1e-4)
    sharded, _ = train("sharded", compile=True, use_fsdp=True, use_activation_checkpointing=True)
    assert sharded == pytest.approx(whole, abs=1e-4)

    train("resumed", 2, compile=True)
    _, again = train("resumed", 3, compile=True, resume_from_checkpoint=tmp_path / "resumed")
    assert torch.equal(again, straight)
    with (
        safe_open(tmp_path / "eager" / "final" / "model.safetensors", framework="pt") as plain,
        safe_open(tmp_path / "compiled" / "final" / "model.safetensors", framework="pt") as file,
    ):
        assert list(file.keys()) == list(plain.keys())

    _, kept = train("kept", compile=True, dropout=0.3)
    _, recomputed = train("recomputed", compile=True, dropout=0.3, use_activation_checkpointing=True)
    assert torch.allclose(kept, recomputed, atol=1e-6), "the same dropout in both passes"


def test_compile_without_a_compiler_is_rejected_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert environment.compiler() is None
    with pytest.raises(CannotTrain, match=r"compile is true, .* a C\+\+ compiler"):
        Trainer(model=llama(), max_steps=1, output_dir=tmp_path / "out", compile=True, **SETTINGS)


def test_kernels_are_kept_in_the_cache_whatever_torch_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing parts of torch sets the variable to a folder in /tmp; a folder that a user has chosen is kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chosen, default = str(tmp_path / "chosen"), str(tmp_path / "torchinductor_user")
    own = str(tmp_path / "cache" / environment.COMPILED_CODE)
    for before, during in ((default, own), (chosen, chosen)):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        with environment.library_environment(tmp_path / "cache", deepspeed=False, cuda=False):
            assert cache_dir_utils.cache_dir() == during
        assert cache_dir_utils.cache_dir() == before
