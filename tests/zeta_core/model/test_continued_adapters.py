"""``lora.continue_adapter``: the adapter of an earlier run is trained further, with its own rank and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.zeta_core.dry_run.test_check import answer_to
from tests.zeta_core.models import llama
from tests.zeta_core.runs import train
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.spec.sources import JobModel
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import CannotTrain

BASE, FIRST = "job_01m0000000000000000000base", "job_01m00000000000000000000one"
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
CONTINUED = {"continue_adapter": True}
ADAPTER = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}


class Store:
    """An artifact store with a base and the adapter that a job has trained on it."""

    def __init__(self, root: Path, **lora: Any) -> None:
        self.root = root
        self.locations = SourceLocations(artifacts_root=root / "artifacts")
        base: Any = llama(**SHAPE)
        base.save_pretrained(self.checkpoints(BASE) / "final")
        train(JobModel(job=BASE), self.checkpoints(FIRST), **self.options(lora={**ADAPTER, **lora}))

    def checkpoints(self, job: str) -> Path:
        return self.root / "artifacts" / "jobs" / job / "checkpoints"

    def options(self, **options: Any) -> dict[str, Any]:
        return {"cache": self.root, "locations": self.locations, "max_steps": 2, **options}

    def continue_in(self, folder: str, **options: Any) -> tuple[Path, Any]:
        out = self.root / folder
        _, lines = train(JobModel(job=FIRST), out, **{**self.options(lora=CONTINUED), **options})
        return out / "final", lines.resolved_spec


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_continued_adapter_keeps_its_settings_and_its_base(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.checkpoints(FIRST) / "final"
    final, resolved = store.continue_in("next")
    about, before = (json.loads((folder / "adapter_config.json").read_text()) for folder in (final, first))
    assert about == before, "the base in it is that of the first job, so both adapters can be loaded on it"
    assert {name: resolved["lora"][name] for name in ADAPTER} == {**ADAPTER, "target_modules": ["down_proj", "q_proj"]}
    assert resolved["lora"]["continue_adapter"] is True
    assert resolved["num_parameters"] == sum(p.numel() for p in llama(**SHAPE).parameters())
    assert resolved["num_trained_parameters"] == sum(tensor.numel() for tensor in weights_in(first).values())

    base: Any = AutoModelForCausalLM.from_pretrained(store.checkpoints(BASE) / "final")
    same = PeftModel.from_pretrained(base, str(first), is_trainable=True)
    train(same, tmp_path / "by peft", cache=tmp_path, max_steps=2)
    expected = weights_in(tmp_path / "by peft" / "final")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights_in(final).items())
    assert any(not torch.equal(expected[name], tensor) for name, tensor in weights_in(first).items())

    answer = answer_to(
        {"model": {"job": FIRST, "checkpoint": "final"}, "tokenizer": {"builtin": "bytes"}, "lora": CONTINUED},
        artifacts_root=str(tmp_path / "artifacts"),
        cache_dir=str(tmp_path / "cache"),
        bases=[f"{BASE}/final"],
    )
    assert answer.ok, answer.details
    assert answer.num_parameters == resolved["num_parameters"]
    assert answer.num_trained_parameters == resolved["num_trained_parameters"]
    assert answer.resolved_spec is not None
    assert answer.resolved_spec["lora"]["r"] == 3


@pytest.mark.extended
@pytest.mark.parametrize("options", [{}, {"use_fsdp": True}], ids=["replicated", "fsdp2"])
def test_a_resumed_continuation_ends_with_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path, lora_dropout=0.2)
    same: dict[str, Any] = {"lr_scheduler": "constant", **options}
    whole, _ = store.continue_in("whole", max_steps=4, **same)
    store.continue_in("parts", max_steps=2, **same)
    parts, _ = store.continue_in("parts", max_steps=4, resume=True, **same)
    assert weights_in(whole).keys() == weights_in(parts).keys()
    assert all(torch.equal(weights_in(parts)[name], tensor) for name, tensor in weights_in(whole).items())


@pytest.mark.parametrize("added", [{}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}], ids=str)
def test_an_adapter_is_continued_on_a_4_bit_base_and_merged(added: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    store = Store(tmp_path, quantize="nf4", save_merged=True, **added)
    final, resolved = store.continue_in("next", lora={**CONTINUED, "quantize": "nf4", "save_merged": True})
    assert resolved["lora"]["quantize"] == "nf4"
    untouched: Any = AutoModelForCausalLM.from_pretrained(store.checkpoints(BASE) / "final")
    sums: Any = PeftModel.from_pretrained(untouched, str(final)).merge_and_unload().state_dict()
    merged: Any = AutoModelForCausalLM.from_pretrained(final / "merged")
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, sums[name], atol=1e-6), name
    before = weights_in(store.checkpoints(FIRST) / "final")
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights_in(final).items())


def test_an_adapter_in_a_folder_is_continued(tmp_path: Path) -> None:
    store = Store(tmp_path)
    base: Any = AutoModelForCausalLM.from_pretrained(store.checkpoints(BASE) / "final")
    adapter = PeftModel.from_pretrained(base, str(store.checkpoints(FIRST) / "final"))
    adapter.peft_config["default"].base_model_name_or_path = str(store.checkpoints(BASE) / "final")
    adapter.save_pretrained(str(tmp_path / "adapter"))
    final, _ = store.continue_in("next")
    train(str(tmp_path / "adapter"), tmp_path / "of folder", cache=tmp_path, max_steps=2, lora=CONTINUED)
    expected = weights_in(final)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights_in(tmp_path / "of folder/final").items())


def test_a_continuation_that_is_not_possible_is_rejected(tmp_path: Path) -> None:
    store = Store(tmp_path, use_dora=True)
    with pytest.raises(InvalidSpec, match=r"lora\.r is 8; the adapter that is continued has its own"):
        store.continue_in("out", lora={**CONTINUED, "r": 8})
    with pytest.raises(CannotTrain, match="base/final is not an adapter that is stored in files") as raised:
        train(JobModel(job=BASE), tmp_path / "out", **store.options(lora=CONTINUED))
    assert raised.value.param == "lora.continue_adapter"
    with pytest.raises(CannotTrain, match=r"can't be continued with these options: lora\.use_dora is true"):
        store.continue_in("out", use_fsdp=True)
    answer = answer_to({"lora": CONTINUED})
    assert [detail.param for detail in answer.details] == ["lora.continue_adapter"]
    assert "built without an adapter" in answer.details[0].message
