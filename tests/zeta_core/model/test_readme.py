"""The README.md of an adapter: its commands and code are run, and load the adapter on its base."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.zeta_core.models import llama, plain
from tests.zeta_core.runs import train
from zeta_core.contract.spec.sources import JobModel
from zeta_core.data.sources import SourceLocations
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.readme import adapter_readme

BASE_JOB, ADAPTER_JOB = "job_01m0000000000000000000base", "job_01m00000000000000000000one"


def lines_of(readme: Path) -> list[str]:
    """The Python blocks."""
    return re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)


def run_block(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer = model.eval().float()(torch.arange(3, 35)[None])
    return getattr(answer, "logits", answer)


def test_the_code_loads_the_adapter_on_a_local_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    lora = {"r": 2, "save_merged": True}
    train(str(tmp_path / "base"), tmp_path / "out", cache=tmp_path, max_steps=2, lora=lora)
    final = tmp_path / "out" / "final"
    roles = {file["path"]: file["role"] for file in json.loads((final / "manifest.json").read_text())["files"]}
    assert roles["README.md"] == "config"
    assert "merged/README.md" not in roles
    monkeypatch.chdir(final)
    adapter, merged = lines_of(final / "README.md")
    names = run_block(adapter)
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(names["model"]), logits(PeftModel.from_pretrained(base, str(final))))
    assert names["tokenizer"]("text").input_ids == [119, 104, 123, 119, 1]
    assert torch.allclose(logits(run_block(merged)["model"]), logits(names["model"]), atol=0.02)


@pytest.mark.extended
@pytest.mark.parametrize("save_merged", [False, True])
def test_the_code_loads_a_base_that_is_a_job(
    save_merged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is a complete model, then an adapter."""
    store = tmp_path / "artifacts" / "jobs"
    locations = SourceLocations(artifacts_root=tmp_path / "artifacts")
    llama().save_pretrained(store / BASE_JOB / "checkpoints" / "final")  # pyright: ignore[reportCallIssue]
    first = store / ADAPTER_JOB / "checkpoints"
    lora = {"r": 2, "save_merged": save_merged}
    train(JobModel(job=BASE_JOB), first, cache=tmp_path, locations=locations, max_steps=2, lora=lora)
    train(JobModel(job=ADAPTER_JOB), tmp_path / "two", cache=tmp_path, locations=locations, max_steps=2, lora={"r": 2})

    readme = (first / "final" / "README.md").read_text()
    assert f"zeta download {BASE_JOB} --checkpoint final -o base\n" in readme
    assert str(tmp_path) not in readme
    here = tmp_path / "here"
    shutil.copytree(first / "final", here)
    shutil.copytree(store / BASE_JOB / "checkpoints" / "final", here / "base")  # as the command downloads it
    monkeypatch.chdir(here)
    loaded = run_block(lines_of(here / "README.md")[0])["model"]
    assert loaded.peft_config["default"].r == 2

    command = f"zeta download {ADAPTER_JOB} --checkpoint final -o base{' --merged' if save_merged else ''}\n"
    second = tmp_path / "two" / "final"
    assert command in (second / "README.md").read_text()
    if save_merged:
        shutil.copytree(first / "final" / "merged", second / "base")
        monkeypatch.chdir(second)
        run_block(lines_of(second / "README.md")[0])


def test_a_base_from_the_hub_is_named_with_its_revision() -> None:
    located = LocatedModel(llama, "org/name", base_model="org/name@0123abc")
    readme = adapter_readme(located, None, is_module=False, has_merged=False)
    assert readme.startswith("---\nbase_model: org/name\nlibrary_name: peft\n")
    assert 'AutoModelForCausalLM.from_pretrained("org/name", revision="0123abc")' in readme


def test_the_readme_explains_how_to_get_an_uploaded_base_or_module(tmp_path: Path) -> None:
    gguf = tmp_path / "small.gguf"
    gguf.touch()
    located = LocatedModel(llama, "small", gguf, base_model="file_01m00000000000000000000000")
    readme = adapter_readme(located, None, is_module=False, has_merged=False)
    assert '"$ZETA_URL/v1/files/file_01m00000000000000000000000/content"' in readme
    assert 'from_pretrained("base", gguf_file="small.gguf")' in readme
    train(plain(), tmp_path / "out", cache=tmp_path, max_steps=1, lora={"r": 2})
    assert "from my_model import build_base" in (tmp_path / "out" / "final" / "README.md").read_text()
