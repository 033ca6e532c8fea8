"""Differences on a GPU: defaults, kernels, running out of memory, and bit-identical results.

Without an NVIDIA GPU, all tests are skipped; with a single one, those that need several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.gpus import count_gpus
from tests.zeta_core.models import PlainModel, llama, plain
from tests.zeta_core.parallel.test_parallel import case, results
from zeta import Trainer
from zeta_core.checkpoint.staging import Staging
from zeta_core.model.quantization import quantize
from zeta_core.objective.document_kernel import kernel_problem
from zeta_core.optim.optimizer import ParameterGroups, build_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SETTINGS: dict[str, Any] = {"seq_len": 64, "batch_size": 4, "learning_rate": 1e-2, "lr_scheduler": "constant"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))


def plan_of(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "final" / "training_state" / "state.json").read_text())["plan"]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


def test_a_gpu_trains_in_bf16_with_fused_kernels_by_default(tmp_path: Path) -> None:
    model = llama()
    result = Trainer(model=model, max_steps=3, output_dir=tmp_path / "out", **SETTINGS)
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    assert plan_of(tmp_path / "out")["mixed_precision"] == expected
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters()), "the trained weights are float32"
    reference = Trainer(model=llama(), max_steps=3, output_dir=tmp_path / "no", mixed_precision="no", **SETTINGS)
    assert result.train_loss == pytest.approx(reference.train_loss, abs=2e-2)
    on_gpu = plain().cuda()
    groups = ParameterGroups.of(on_gpu, [on_gpu], "adamw")
    optimizer = build_optimizer("adamw", on_gpu, groups, learning_rate=1e-3, weight_decay=0.1)
    assert all(group["fused"] for group in optimizer.param_groups)


def test_saved_tensors_are_copied_to_pinned_memory() -> None:
    weight = torch.randn(64, 64, device="cuda")
    staging = Staging()
    for copies in (staging.copy("now/", {"weight": weight}), staging.copy_later("later/", {"weight": weight})):
        staging.finish()
        torch.cuda.synchronize()
        assert copies["weight"].is_pinned()
        assert torch.equal(copies["weight"], weight.cpu())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_same_seed_gives_the_same_bits_straight_or_resumed(precision: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SETTINGS, "mixed_precision": precision, "deterministic": True}
    models = [llama(attention_dropout=0.2) for _ in range(4)]
    Trainer(model=models[0], max_steps=6, output_dir=tmp_path / "one", **settings)
    Trainer(model=models[1], max_steps=6, output_dir=tmp_path / "other", **settings)
    Trainer(model=models[2], max_steps=3, output_dir=tmp_path / "parts", **settings)
    Trainer(
        model=models[3],
        max_steps=6,
        output_dir=tmp_path / "parts",
        resume_from_checkpoint=tmp_path / "parts",
        **settings,
    )
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert torch.equal(weights(models[0]), weights(models[3]))


def test_packed_documents_are_computed_by_one_kernel_as_with_a_mask(tmp_path: Path) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("flash attention needs a GPU with bfloat16")
    assert [kernel_problem(torch.device("cuda", 0), torch.bfloat16, size) for size in (64, 128)] == [None, None]
    losses: dict[str, float] = {}
    for name in ("auto", "sdpa"):
        out = tmp_path / name
        result = Trainer(model=llama(), max_steps=3, output_dir=out, attn_implementation=name, **SETTINGS)
        losses[name] = result.train_loss or 0.0
        assert plan_of(out)["attn_implementation"] == {"auto": "varlen", "sdpa": "sdpa"}[name]
    assert losses["auto"] == pytest.approx(losses["sdpa"], abs=2e-2)


class Steep(PlainModel):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 30 * super().forward(ids)


def test_the_loss_scale_of_fp16_is_halved_on_a_gpu_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    result = Trainer(model=Steep(), max_steps=3, output_dir=tmp_path / "out", mixed_precision="fp16", **SETTINGS)
    assert "overflowed fp16; repeating it with loss scale 32,768" in capsys.readouterr().out
    assert result.steps == 3


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit torch's allocator to 600 MB of the GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(600e6 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_running_out_of_memory_halves_the_micro_batch_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 1024}
    out = tmp_path / "out"
    Trainer(model=llama(**wide), seq_len=1024, max_steps=2, output_dir=out, mixed_precision="no")
    assert "Memory ran out: batch_size is" in capsys.readouterr().out
    plan = plan_of(out)
    assert plan["batch_size"] < 32
    assert plan["batch_size"] * plan["gradient_accumulate_every"] == 32
    again = Trainer(
        model=llama(**wide), seq_len=1024, max_steps=3, output_dir=out, mixed_precision="no", resume_from_checkpoint=out
    )
    assert again.steps_trained == 1
    assert "Memory ran out" not in capsys.readouterr().out, "the split that fits is kept"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("rows", [1, 16, 2000])
def test_4_bit_layers_without_gradients_compute_with_their_dequantized_weights(rows: int) -> None:
    """bitsandbytes has kernels of its own for this, which depend on the number of rows."""
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 10))
    quantize(model, "nf4", torch.bfloat16, torch.device("cuda"))
    layer: Any = model.get_submodule("0")
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=0.05, rtol=0.05)


def test_compiled_blocks_train_the_same_on_a_gpu(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SETTINGS, "mixed_precision": "no", "max_steps": 3}
    eager = Trainer(model=llama(), output_dir=tmp_path / "eager", **settings)
    compiled = Trainer(model=llama(), output_dir=tmp_path / "compiled", compile=True, **settings)
    assert compiled.train_loss == pytest.approx(eager.train_loss, abs=1e-3)


def test_recomputing_activations_saves_memory_and_gives_the_same_bits_on_a_gpu(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 1024}
    settings: dict[str, Any] = {**SETTINGS, "seq_len": 1024, "batch_size": 8, "max_steps": 2, "deterministic": True}
    found, peaks = list[torch.Tensor](), list[int]()
    for how in (False, "selective", True, "offload"):
        model = llama(num_hidden_layers=6, **shape)
        torch.cuda.reset_peak_memory_stats()
        Trainer(model=model, output_dir=tmp_path / str(how), use_activation_checkpointing=how, **settings)
        found.append(weights(model))
        peaks.append(torch.cuda.max_memory_allocated())
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert peaks == sorted(peaks, reverse=True)


def test_a_base_in_4_bits_is_trained_on_a_gpu_and_resumed_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = {**SETTINGS, "lora": {"r": 4, "quantize": "nf4"}}
    models = [llama(hidden_size=256, intermediate_size=1024) for _ in range(4)]
    straight = Trainer(model=models[0], max_steps=4, output_dir=tmp_path / "straight", **settings)
    Trainer(model=models[1], max_steps=2, output_dir=tmp_path / "parts", **settings)
    parts = tmp_path / "parts"
    Trainer(model=models[2], max_steps=4, output_dir=parts, resume_from_checkpoint=parts, **settings)
    files = [tmp_path / folder / "final" / "adapter_model.safetensors" for folder in ("straight", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    packed = [parameter for parameter in models[0].parameters() if parameter.dtype == torch.uint8]
    assert len(packed) == 14
    assert all(parameter.is_cuda for parameter in packed)
    settings["lora"] = {"r": 4}
    whole = Trainer(model=models[3], max_steps=4, output_dir=tmp_path / "whole", **settings)
    assert straight.train_loss == pytest.approx(whole.train_loss, abs=0.1)


def test_shards_on_the_host_train_the_same_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    sharded: dict[str, Any] = {**SETTINGS, "learning_rate": 1e-3, "use_fsdp": True, "mixed_precision": "no"}
    sharded["deterministic"] = True
    offloaded = {**sharded, "fsdp_cpu_offload": True}
    parts = tmp_path / "parts"
    runs: dict[str, tuple[Path, int, dict[str, Any]]] = {
        "on the GPU": (tmp_path / "gpu", 4, sharded),
        "straight": (tmp_path / "straight", 4, offloaded),
        "first part": (parts, 2, offloaded),
        "resumed": (parts, 4, {**offloaded, "resume_from_checkpoint": parts}),
    }
    found, peaks = dict[str, torch.Tensor](), dict[str, int]()
    for name, (out, steps, settings) in runs.items():
        model = llama(**shape)
        torch.cuda.reset_peak_memory_stats()
        Trainer(model=model, max_steps=steps, output_dir=out, **settings)
        found[name] = weights(model)
        peaks[name] = torch.cuda.max_memory_allocated()
    torch.testing.assert_close(found["straight"], found["on the GPU"], atol=1e-5, rtol=0)
    assert torch.equal(found["straight"], found["resumed"])
    assert peaks["straight"] < peaks["on the GPU"]


@pytest.mark.skipif(count_gpus() < 2, reason="NCCL between processes needs two GPUs")
def test_two_gpus_train_the_same_as_one(tmp_path: Path) -> None:
    same: dict[str, Any] = {"model": "tied llama", "mixed_precision": "no"}
    alone = results(tmp_path, 1, [case("alone", world=1, **same)])["alone"]
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    strategies["fsdp2 offloaded"] = {"use_fsdp": True, "fsdp_cpu_offload": True}
    strategies["fsdp2 muon"] = {"use_fsdp": True, "optimizer": "muon"}
    found = results(tmp_path, 2, [case(name, world=2, **same, **more) for name, more in strategies.items()])
    for name in ("ddp", "fsdp2", "fsdp2 offloaded"):
        assert found[name]["loss"] == pytest.approx(alone["loss"], abs=1e-4), name
    assert found["fsdp2 muon"]["steps_trained"] == 5
