"""Micro-batches that fit in memory, rejected runs, and recomputed activations."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.memory_cgroup import memory_cgroup
from tests.zeta_core.advice_runs import apply_patch, train
from tests.zeta_core.memory import oversized_runs
from tests.zeta_core.models import LLAMA_CONFIG, PlainModel, llama, plain
from tests.zeta_core.parallel.test_parallel import environment
from zeta import Trainer
from zeta_core.contract.job.job import JobError
from zeta_core.contract.job.status import StatusReason
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import OutOfMemory, explain
from zeta_core.memory.estimate import MemoryByPart, has_plenty_of_memory, minimum_memory
from zeta_core.memory.limits import check_before_loading, check_before_training
from zeta_core.model.activation_checkpointing import recomputed_activations, repeated_blocks
from zeta_core.plan import PlanInputs, decide_plan, with_length


class Small(PlainModel):
    """Runs out of memory, as on a GPU, with more than three sequences at once."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(ids)


@pytest.mark.extended
def test_the_micro_batch_is_halved_until_it_fits_and_the_split_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    small = Small(dropout=0.1)
    found = Trainer(model=small, seq_len=32, max_steps=2, output_dir=tmp_path / "small")
    assert "batch_size is 2 and gradient_accumulate_every 16 from now on" in capsys.readouterr().out
    torch.manual_seed(0)
    split: dict[str, Any] = {"batch_size": 2, "gradient_accumulate_every": 16}
    given = Trainer(model=PlainModel(dropout=0.1), seq_len=32, max_steps=2, output_dir=tmp_path / "given", **split)
    assert found.train_loss == given.train_loss, "the step was repeated with the same random numbers"
    state = json.loads((tmp_path / "small" / "final" / "training_state" / "state.json").read_text())
    assert {name: state["plan"][name] for name in split} == split
    again = Trainer(
        model=small, seq_len=32, max_steps=3, output_dir=tmp_path / "small", resume_from_checkpoint=tmp_path / "small"
    )
    assert again.steps_trained == 1
    assert "Memory ran out" not in capsys.readouterr().out


class Device(PlainModel):
    """Runs out of memory, as on a GPU, when a forward keeps more than ``num_bytes`` for its gradient."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.free = num_bytes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.free = self.num_bytes
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            return super().forward(ids)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.free -= tensor.numel() * tensor.element_size()
        if self.free < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return tensor


@pytest.mark.extended
def test_each_advice_about_memory_is_applied_until_the_run_fits(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"seq_len": 512, "batch_size": 6, "gradient_accumulate_every": 2, "max_steps": 1}
    outcome, ends = None, list[tuple[StatusReason, JobError]]()
    while outcome is None:
        try:
            outcome, _ = train(tmp_path, Device(100_000), spec)
        except OutOfMemory as error:
            ends.append(explain(error))
            spec = apply_patch(spec, ends[-1][1].patch)
    patches = [error.patch for _, error in ends]
    assert patches == [
        {"batch_size": 3, "gradient_accumulate_every": 4},
        {"batch_size": 1, "gradient_accumulate_every": 12},
        {"use_activation_checkpointing": True},
        {"seq_len": 256},
    ]
    reason, error = ends[-1]
    assert (reason, error.code) == ("out_of_memory", "out_of_memory")
    assert outcome.progress.consumed_sequences == 12, "the global batch is still the requested one"
    evidence = error.evidence.model_extra or {}
    assert (evidence["step"], evidence["batch_size"], evidence["seq_len"]) == (1, 1, 512)
    assert evidence["memory"]["weights"] == sum(4 * p.numel() for p in PlainModel().parameters())
    assert "OutOfMemoryError: CUDA out of memory" in evidence["error"]


def test_an_exception_in_a_script_contains_the_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))
    with pytest.raises(OutOfMemory) as raised:
        Trainer(model=Small(), seq_len=32, max_steps=1, batch_size=4, output_dir=tmp_path / "out")
    assert str(raised.value).endswith(
        "Use batch_size 2 with gradient_accumulate_every 2: the global batch stays the same. "
        "Set batch_size=2, gradient_accumulate_every=2."
    )
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_a_run_that_cannot_fit_is_rejected_before_the_first_step(tmp_path: Path) -> None:
    spec = {"seq_len": 256, "batch_size": 10**6, "max_steps": 1, "learning_rate": 1e-3}
    with pytest.raises(OutOfMemory, match=r"needs at least .* GiB per process \(.*hidden_states 977 GiB.*\), but only"):
        train(tmp_path, llama(hidden_size=1024), spec)


def test_a_model_that_can_never_fit_is_rejected_before_it_is_loaded(tmp_path: Path) -> None:
    wide = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 64, "vocab_size": 1 << 18}
    spec = {"seq_len": 32, "batch_size": 1, "max_steps": 1, "learning_rate": 1e-3}
    with pytest.raises(OutOfMemory, match=r"needs at least .* GiB per process \(weights .*\), but only") as raised:
        train(tmp_path, ConfigModel(config={**LLAMA_CONFIG, **wide}), spec)
    assert (raised.value.code, raised.value.patch) == ("cannot_fit", None)
    assert not (tmp_path / "cache").exists(), "no data was read"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_with_little_memory_runs_train_in_chunks_or_with_the_suggested_patch(tmp_path: Path) -> None:
    with memory_cgroup(2_600_000_000) as procs:
        command = f"exec {shlex.quote(sys.executable)} {oversized_runs.__file__} {tmp_path}"
        join = f"echo $$ > {shlex.quote(str(procs))}; {command}"
        run = subprocess.run(["/bin/sh", "-c", join], env=environment(tmp_path), capture_output=True, timeout=180)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    batch, whole = map(json.loads, (tmp_path / "outcomes.jsonl").read_text().splitlines())
    assert batch == {"code": None}, "the loss is computed in chunks"
    assert whole["patch"] == {"lora": {}}
    assert (whole["code"], whole["steps_trained"]) == ("cannot_fit", 1)
    assert abs(whole["capacity"] - 2_600_000_000) < 4096 * 16, "rounded to whole pages"


def test_a_model_too_large_for_full_fine_tuning_gets_an_adapter_as_patch(
    tmp_path: Path,
) -> None:
    model: Any = llama(hidden_size=256, intermediate_size=512)
    model.config.save_pretrained(tmp_path / "model")  # without weights, so reading them would fail
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())

    def check(capacity: int, **spec: Any) -> None:
        options = TrainerOptions.model_validate(spec)
        locations = SourceLocations(any_path=True)
        check_before_loading(tmp_path / "model", options, locations, tmp_path, world_size=1, capacity=capacity)

    check(4 * weights)
    check(2 * weights, optimizer="adafactor")
    before = torch.random.get_rng_state()
    with pytest.raises(OutOfMemory) as raised:
        check(2 * weights)
    assert raised.value.patch == {"lora": {}}
    check(2 * weights, **apply_patch({}, raised.value.patch))
    assert torch.equal(torch.random.get_rng_state(), before)
    for spec in ({}, {"lora": {}}):
        with pytest.raises(OutOfMemory, match="a smaller model") as raised:
            check(weights // 2, **spec)
        assert raised.value.patch is None


def test_the_patch_of_a_rejected_run_fits() -> None:
    model = llama()
    options = TrainerOptions(batch_size=6, gradient_accumulate_every=2, seq_len=256, warmup_steps=0.03)
    plan = with_length(
        decide_plan(options, PlanInputs(1, "cpu", False, 1, 256, 1, 1 << 30, True, "data"), None), options, 1000
    )
    needed = minimum_memory(model, plan, 256)
    num_parameters = sum(p.numel() for p in model.parameters())
    weights, logits = 4 * num_parameters, 8 * 6 * 256 * 384
    hidden = 4 * 6 * 256 * 32
    assert needed == MemoryByPart(
        weights=weights, gradients=weights, optimizer=2 * weights, hidden_states=hidden, logits=logits
    )
    check_before_training(model, plan, 256, may_split=False, capacity=needed.total)
    check_before_training(model, plan, 256, may_split=True, capacity=needed.total // 2)
    with pytest.raises(OutOfMemory) as raised:
        check_before_training(model, plan, 256, may_split=False, capacity=needed.total // 2)
    assert (raised.value.code, raised.value.patch) == ("cannot_fit", {"batch_size": 1, "gradient_accumulate_every": 12})
    with pytest.raises(OutOfMemory) as raised:
        check_before_training(model, plan, 256, may_split=False, capacity=needed.total - 1)
    one = minimum_memory(model, replace(plan, batch_size=1), 256).total
    assert one <= needed.total // 2 < minimum_memory(model, replace(plan, batch_size=3), 256).total
    assert raised.value.patch == {"batch_size": 1, "gradient_accumulate_every": 12}, "3 would fit, without activations"
    with pytest.raises(OutOfMemory, match="train an adapter with lora") as raised:
        check_before_training(model, plan, 256, may_split=False, capacity=8 * num_parameters)
    assert raised.value.patch is None, "a smaller batch does not reduce the weights"


@pytest.mark.gpu
def test_a_full_gpu_is_reported_by_part_and_the_patched_run_fits(tmp_path: Path) -> None:
    config = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000, "max_position_embeddings": 1024}
    spec: dict[str, Any] = {"seq_len": 1024, "batch_size": 64, "max_steps": 1, "learning_rate": 1e-4}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / total))
    try:
        errors: list[OutOfMemory] = []
        while len(errors) < 6:
            try:
                train(tmp_path, llama(**config), spec)
                break
            except OutOfMemory as error:
                errors.append(error)
                spec = apply_patch(spec, error.patch)
        assert 0 < len(errors) < 6, f"{len(errors)} patches, at last {spec}"
        evidence = errors[0].evidence
        memory, peak = evidence["memory"], evidence["peak_bytes"]
        assert isinstance(memory, dict)
        assert memory["weights"] == sum(4 * p.numel() for p in llama(**config).parameters())
        assert isinstance(peak, int)
        assert 2**30 < peak <= 24 * 2**30
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    "build", [lambda: plain(dropout=0.3), lambda: llama(attention_dropout=0.3)], ids=["plain", "llama"]
)
def test_recomputed_activations_give_the_same_gradient_with_dropout(build: object) -> None:
    assert callable(build)
    gradients: list[torch.Tensor] = []
    for how in (False, True, "selective", "offload"):
        model = build()
        assert isinstance(model, nn.Module)
        blocks = repeated_blocks(model)
        assert len(blocks) == 2
        torch.manual_seed(1)
        ids = torch.randint(3, 300, (2, 16))
        with recomputed_activations(blocks, how):
            answer = model(ids, **({"use_cache": False} if hasattr(model, "config") else {}))
            getattr(answer, "logits", answer).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_a_module_without_repeated_blocks_is_one_block() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    assert repeated_blocks(model) == [model]


def test_freed_memory_is_kept_only_if_memory_is_plentiful() -> None:
    facts = PlanInputs(1, "cpu", False, 1, 256, 1, 1 << 30, True, "data")
    options = TrainerOptions(seq_len=32, max_steps=1, warmup_steps=0.03)
    plan = with_length(decide_plan(options, facts, None), options, 100)
    assert has_plenty_of_memory(plain(), plan, 32, values_per_token=1_000)
    assert not has_plenty_of_memory(plain(), plan, 32, values_per_token=1 << 40)
    assert not has_plenty_of_memory(plain(), replace(plan, world_size=1 << 40), 32, values_per_token=1_000)
