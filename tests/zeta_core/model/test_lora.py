"""LoRA: the base is unchanged, the adapter has peft's layout, merged weights are the sum, and resuming is exact."""

from __future__ import annotations

import json
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.zeta_core.models import llama, plain
from tests.zeta_core.runs import train
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.spec.sources import FileModel, JobModel
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import CannotResume, CannotTrain, InvalidModel
from zeta_core.model.sources import locate_model

IDS = torch.arange(3, 35)[None]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=384, n_positions=64))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        answer = model(IDS)
    return getattr(answer, "logits", answer)


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (lambda: llama(tie_word_embeddings=True), {}),
        (gpt2, {"target_modules": ["c_attn", "c_fc", "wpe"]}),
        (gpt2, {"target_modules": r"transformer\.h\.1\..*c_proj"}),
        (llama, {"use_rslora": True}),
        (llama, {"use_dora": True}),
        (gpt2, {"use_dora": True, "target_modules": ["c_attn", "c_fc", "wpe"]}),
    ],
    ids=["llama", "gpt2 Conv1D and Embedding", "gpt2 by pattern", "rslora", "dora", "gpt2 dora"],
)
def test_peft_loads_the_adapter_and_merges_it_to_the_same_weights(
    build: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = build()
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "save_merged": True, **changes}
    outcome, lines = train(str(tmp_path / "base"), tmp_path / "out", cache=tmp_path, max_steps=4, lora=lora)
    final = tmp_path / "out" / "final"
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["format"] == "adapter"
    roles = {file["path"]: file["role"] for file in manifest["files"]}
    assert (roles["adapter_model.safetensors"], roles["adapter_config.json"]) == ("adapter", "adapter")
    assert roles["merged/model.safetensors"] == "weights"
    adapter = load_file(final / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.any() for tensor in adapter.values()), "one factor of each pair starts at zero"
    assert lines.resolved_spec["num_trained_parameters"] == sum(tensor.numel() for tensor in adapter.values())

    untouched: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(tensor, before[name]) for name, tensor in untouched.state_dict().items())
    alone = logits(untouched.float())
    adapted = PeftModel.from_pretrained(untouched, str(final))
    assert not torch.allclose(logits(adapted), alone, atol=1e-3)
    by_name: Any = AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    assert torch.equal(logits(by_name), logits(adapted))
    merged: Any = AutoModelForCausalLM.from_pretrained(final / "merged")
    assert merged.dtype == torch.bfloat16
    sums = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        rounding = 2**-7 if "use_dora" in changes else 0.0  # one bit of bfloat16: norms are summed in another order
        torch.testing.assert_close(tensor, sums[name].to(torch.bfloat16), rtol=rounding, atol=0.0, msg=name)

    # The adapter and its training state are small; intermediate checkpoints have no merged model.
    assert outcome.progress.step == 4
    state = [file for file in manifest["files"] if file["role"] == "state" and file["path"].endswith(".safetensors")]
    assert sum(file["size"] for file in state) < 4 * (final / "adapter_model.safetensors").stat().st_size


@pytest.mark.extended
def test_a_resumed_run_with_lora_ends_with_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora": {"r": 2, "lora_dropout": 0.2}, "lr_scheduler": "constant", "seed": 7}
    for model in ("plain", "llama"):
        built: Any = plain if model == "plain" else llama
        train(built(), tmp_path / model, cache=tmp_path, max_steps=4, **options)
        train(built(), tmp_path / f"{model}-parts", cache=tmp_path, max_steps=2, **options)
        del options["seed"]
        train(built(), tmp_path / f"{model}-parts", cache=tmp_path, resume=True, max_steps=4, **options)
        options["seed"] = 7
        files = [tmp_path / folder / "final" / "adapter_model.safetensors" for folder in (model, f"{model}-parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    adapted = PeftModel.from_pretrained(plain(), str(tmp_path / "plain" / "final"))
    assert not torch.allclose(logits(adapted), logits(plain()), atol=1e-3)
    other = llama()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(CannotResume, match="not the base that the run was started with"):
        train(other, tmp_path / "llama", cache=tmp_path, resume=True, max_steps=5, **options)


def test_the_base_keeps_its_precision_if_the_run_computes_in_it(tmp_path: Path) -> None:
    for precision, expected in (("bf16", torch.bfloat16), ("no", torch.float32)):
        model: Any = llama()
        (before,) = {buffer.dtype for buffer in model.buffers()}
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()  # as from_pretrained does, which does not convert buffers
        train(model, tmp_path / precision, cache=tmp_path, max_steps=1, lora={"r": 2}, mixed_precision=precision)
        kinds = {("lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
        assert kinds == {(True, torch.float32), (False, expected)}
        assert {buffer.dtype for buffer in model.buffers()} == {before}, "rotary frequencies keep their precision"


@pytest.mark.extended
def test_a_checkpoint_of_an_adapter_is_a_model_for_a_later_run(tmp_path: Path) -> None:
    """It is loaded on its base if the base has a name, otherwise with its merged weights; without both, it fails."""
    saved: Any = llama()
    saved.save_pretrained(tmp_path / "artifacts" / "jobs" / "job_base" / "checkpoints" / "final")
    locations = SourceLocations(artifacts_root=tmp_path / "artifacts")

    def fine_tune(job: str, of: Any, **lora: Any) -> Path:
        folder = tmp_path / "artifacts" / "jobs" / job / "checkpoints"
        train(of, folder, cache=tmp_path, locations=locations, max_steps=2, lora={"r": 2, **lora})
        return folder / "final"

    base, adapter = "job_01m0000000000000000000base", "job_01m00000000000000000000one"
    (tmp_path / "artifacts" / "jobs" / "job_base").rename(tmp_path / "artifacts" / "jobs" / base)
    first = fine_tune(adapter, JobModel(job=base))
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{base}/final"
    assert str(tmp_path) not in (first / "adapter_config.json").read_text()

    untouched: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "artifacts" / "jobs" / base / "checkpoints/final")
    expected = PeftModel.from_pretrained(untouched, str(first)).merge_and_unload().state_dict()
    train(
        JobModel(job=adapter), tmp_path / "full", cache=tmp_path, locations=locations, max_steps=1, learning_rate=1e-12
    )
    found = load_file(tmp_path / "full" / "final" / "model.safetensors")
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)
    assert json.loads((tmp_path / "full" / "final" / "manifest.json").read_text())["base_model"] == f"{adapter}/final"

    # An adapter may name only the bases that the server allows, because its run may have been taken over.
    for bases, message in (({f"{base}/final"}, None), ({f"{base}/best"}, "its job was not trained on this model")):
        allowed = replace(locations, bases=frozenset(bases))
        with nullcontext() if message is None else pytest.raises(InvalidModel, match=message):
            locate_model(JobModel(job=adapter), allowed, tmp_path)

    # The base that an uploaded adapter names is not trusted.
    packed = tmp_path / "artifacts" / "files" / "file_01m0"
    packed.parent.mkdir()
    with tarfile.open(packed, "w") as archive:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            archive.add(first / file, file)
    with pytest.raises(InvalidModel, match="is an adapter without its base"):
        train(FileModel(file="file_01m0"), tmp_path / "theirs", cache=tmp_path, locations=locations, max_steps=1)

    nameless = fine_tune("job_01m00000000000000000000two", llama())
    with pytest.raises(InvalidModel, match=r"lora\.save_merged"):
        train(nameless, tmp_path / "rejected", cache=tmp_path, max_steps=1)
    merged = fine_tune("job_01m0000000000000000000three", llama(), save_merged=True)
    train(merged, tmp_path / "from-merged", cache=tmp_path, max_steps=1)
    assert (tmp_path / "from-merged" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "names 'q_prj', which is not in LlamaForCausalLM; its linear layers and embeddings are: down_proj"),
        (["norm"], "names 'model.norm', a LlamaRMSNorm, which LoRA does not adapt"),
        (["lm_head"], "names 'lm_head', which shares its weight with 'model.embed_tokens'"),
        ("q_proj", "is 'q_proj', which matches the full name of no layer"),
    ],
)
def test_an_error_about_missing_targets_lists_the_existing_ones(targets: Any, message: str, tmp_path: Path) -> None:
    lora = {"target_modules": targets}
    with pytest.raises(CannotTrain) as raised:
        train(llama(tie_word_embeddings=True), tmp_path / "out", cache=tmp_path, max_steps=1, lora=lora)
    assert message in raised.value.message
    assert "q_proj" in raised.value.message


# --- Modules that are trained as a whole ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "names", "weights"),
    [
        (llama, ["embed_tokens", "lm_head"], ["model.embed_tokens.weight", "lm_head.weight"]),
        (llama, ["model.layers.0.mlp"], [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]),
        (lambda: llama(tie_word_embeddings=True), ["lm_head"], ["model.embed_tokens.weight", "lm_head.weight"]),
        (gpt2, ["wte"], ["transformer.wte.weight", "lm_head.weight"]),
        (plain, ["norm"], [f"blocks.{n}.norm.{name}" for n in (0, 1) for name in ("weight", "bias")]),
    ],
    ids=["untied", "a block", "tied", "tied gpt2", "plain module"],
)
def test_modules_to_save_are_trained_and_in_the_adapter(
    build: Any, names: list[str], weights: list[str], tmp_path: Path
) -> None:
    model, base = build(), build()
    lora = {"r": 2, "modules_to_save": names, "save_merged": True, "target_modules": "all-linear"}
    train(model, tmp_path / "out", cache=tmp_path, max_steps=3, lora=lora)
    final = tmp_path / "out" / "final"
    saved = load_file(final / "adapter_model.safetensors")
    assert {name for name in saved if ".lora_" not in name} == {f"base_model.model.{name}" for name in weights}
    before = base.state_dict()
    assert all(not torch.equal(saved[f"base_model.model.{name}"], before[name]) for name in weights)
    adapted = PeftModel.from_pretrained(base, str(final))
    assert torch.equal(logits(adapted), logits(model))
    if (final / "merged" / "config.json").is_file():
        merged: Any = AutoModelForCausalLM.from_pretrained(final / "merged")
        assert torch.allclose(logits(merged), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ["embed_token"]}, "names 'embed_token', which is not in LlamaForCausalLM"),
        ({"modules_to_save": ["layers"]}, "names 'layers', which is a ModuleList, which cannot be trained"),
        (
            {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "embed_tokens"]},
            "names 'model.embed_tokens', which is trained as a whole",
        ),
    ],
)
def test_modules_that_cannot_be_saved_are_rejected(lora: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match=message):
        train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1, lora=lora)


# --- Freezing ---------------------------------------------------------------------------------------------------------


def test_frozen_weights_do_not_change_and_are_in_the_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"freeze": ["model.embed_tokens.*", "model.layers.0.*"], "lr_scheduler": "constant"}
    train(llama(), tmp_path / "out", cache=tmp_path, max_steps=2, **options)
    train(llama(), tmp_path / "out", cache=tmp_path, resume=True, max_steps=3, lr_scheduler="constant")
    before, after = llama().state_dict(), load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert after.keys() == before.keys()
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {name for name in before if name.startswith(("model.embed_tokens.", "model.layers.0."))}
    optimizer = load_file(tmp_path / "out" / "final" / "training_state" / "optimizer.safetensors")
    assert not any(name.startswith("model.layers.0.") for name in optimizer)


def test_a_freeze_pattern_that_matches_nothing_or_everything_is_rejected(tmp_path: Path) -> None:
    for freeze, message in (
        (["layers.9*"], "has 'layers.9\\*', which matches no parameter"),
        (["*"], "no parameter to"),
    ):
        with pytest.raises(CannotTrain, match=message):
            train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1, freeze=freeze)
    with pytest.raises(InvalidSpec, match="with lora, only the adapter is trained"):
        train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1, freeze=["*"], lora={})
