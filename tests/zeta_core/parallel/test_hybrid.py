"""HSDP: several copies of the model, each sharded over some of the processes, train like a single sharded one."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.zeta_core.models import plain
from tests.zeta_core.parallel.test_parallel import case, results
from tests.zeta_core.runs import train
from zeta_core.failures import CannotTrain


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_copies_on_two_processes_each_train_like_one_on_four_and_resume(tmp_path: Path) -> None:
    common = {"use_fsdp": True, "lr_scheduler": "constant", "warmup_steps": 0}
    fsdp = case("fsdp", world=4, model="tied llama", steps=6, **common)
    hsdp = case("hsdp", world=4, model="tied llama", steps=4, fsdp_shards=2, **common)
    whole = results(tmp_path, 4, [{**fsdp, "max_steps": 4, "name": "four", "output_dir": "four"}, hsdp, fsdp])
    assert whole["hsdp"]["loss"] == pytest.approx(whole["four"]["loss"], abs=1e-6)
    assert whole["hsdp"]["weight"] == pytest.approx(whole["four"]["weight"], rel=1e-6)
    state = sorted((tmp_path / "hsdp" / "final" / "training_state").glob("optimizer-*.safetensors"))
    assert [file.name for file in state] == [f"optimizer-0000{n}-of-00002.safetensors" for n in (1, 2)]
    with safe_open(state[0], framework="pt") as file:
        assert file.get_slice("model.embed_tokens.weight/exp_avg").get_shape()[0] == 192

    resumed = case("hsdp", world=2, model="tied llama", steps=6, resume_from_checkpoint="hsdp", **common)
    found = results(tmp_path, 2, [resumed])["hsdp"]
    assert found["steps_trained"] == 2
    assert found["loss"] == pytest.approx(whole["fsdp"]["loss"], abs=1e-5)


def test_copies_of_different_sizes_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="fsdp_shards is 2, which does not divide the 1 processes of this run"):
        train(plain(), tmp_path / "out", cache=tmp_path, max_steps=1, use_fsdp=True, fsdp_shards=2)
