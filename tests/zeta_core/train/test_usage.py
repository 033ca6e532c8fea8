"""Progress lines report how a run uses its machine: arithmetic, waiting, and memory by part."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch

from tests.zeta_core.models import llama, plain
from zeta_core.contract.job.events import JOURNAL_LINE, ProgressLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.data.sources import SourceLocations
from zeta_core.environment import ProcessRank
from zeta_core.memory.usage import MemoryUsage
from zeta_core.report.journal_writer import JournalWriter
from zeta_core.report.reporter import Reporter
from zeta_core.run import RunRequest, execute
from zeta_core.train.flops import flops_per_token, peak_flops, peak_flops_by_name
from zeta_core.train.meter import Stopwatch


def test_flops_per_token_are_six_per_multiplied_weight_plus_attention() -> None:
    model = llama(tie_word_embeddings=False)
    embedding = model.get_input_embeddings().weight.numel()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    multiplied = sum(parameter.numel() for parameter in model.parameters()) - embedding
    attention = 12 * 2 * 32 * 64  # layers x (heads x size) x tokens
    assert flops_per_token(model, 64) == 6 * multiplied + attention
    tied = llama(tie_word_embeddings=True)  # the embedding is also the head
    assert flops_per_token(tied, 64) == 6 * sum(parameter.numel() for parameter in tied.parameters()) + attention
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(model, 64) == 4 * multiplied + attention


def test_a_module_without_a_config_counts_its_weights_and_a_cpu_has_no_peak() -> None:
    model = plain()
    assert flops_per_token(model, 64) == 6 * sum(parameter.numel() for parameter in model.parameters())
    assert peak_flops(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_device_is_looked_up_by_its_name(name: str, flops: float | None) -> None:
    assert peak_flops_by_name(name) == flops


def test_a_stopwatch_returns_its_share_and_resets() -> None:
    stopwatch = Stopwatch()
    stopwatch.seconds = 0.5
    assert (stopwatch.share_and_reset(2.0), stopwatch.share_and_reset(2.0), stopwatch.share_and_reset(0.0)) == (
        0.25,
        0.0,
        None,
    )


def fresh_memory(size: int) -> mmap.mmap:
    """Allocate memory directly from the system, not memory that earlier tests freed and the allocator still has."""
    memory = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def test_activations_are_the_peak_of_forward_and_backward_without_gradients() -> None:
    model = torch.nn.Linear(4, 4)
    usage = MemoryUsage()
    held = fresh_memory(64 << 20)
    held.close()
    usage.record_peak()
    more = fresh_memory(256 << 20)  # allocated after forward and backward
    usage.record_peak()
    parts = usage.parts(model, torch.optim.SGD(model.parameters(), lr=0.1))
    more.close()
    assert parts.weights == parts.gradients == 20 * 4
    assert parts.optimizer == 0
    if parts.activations is not None:  # unknown on some systems
        assert 60 << 20 < parts.activations < 128 << 20


def test_progress_lines_have_every_step_waiting_shares_and_memory_by_part(
    tmp_path: Path,
) -> None:
    given = {"seq_len": 32, "batch_size": 2, "gradient_accumulate_every": 1, "max_steps": 7, "checkpointing_steps": 3}
    report = Reporter(JournalWriter(tmp_path / "events.jsonl"))
    options = TrainerOptions.model_validate(given)
    locations = SourceLocations(any_path=True)
    model = llama()
    run = RunRequest(
        options=options, model=model, output_dir=tmp_path / "out", cache=tmp_path / "cache", locations=locations
    )
    execute(run, ProcessRank(), report)
    report.close()
    lines = [JOURNAL_LINE.validate_python(json.loads(text)) for text in (tmp_path / "events.jsonl").open()]
    lines_with_loss = [line for line in lines if isinstance(line, ProgressLine) and line.loss is not None]
    first, last = lines_with_loss[0], lines_with_loss[-1]
    assert [(line.step, [values.step for values in line.steps or []]) for line in lines_with_loss[:2]] == [
        (1, []),
        (3, [2, 3]),
    ]
    each = [values for line in lines_with_loss for values in line.steps or [line]]
    assert [values.step for values in each] == list(range(1, 8)), (
        "no step is missing, however fast, and a save reports all steps before it"
    )
    assert all(values.loss and values.grad_norm and values.tokens == 64 * (values.step or 0) for values in each)
    assert lines_with_loss[1].loss == pytest.approx(sum(values.loss or 0.0 for values in each[1:3]) / 2)
    assert last.step == 7
    assert (first.mfu, last.mfu) == (None, None)
    assert 0 < (first.data_wait_share or 0) < 1
    assert 0 < (last.data_wait_share or 0) < 1
    assert first.checkpoint_blocked_share is not None
    assert 0 < (last.checkpoint_blocked_share or 0) < 1  # the save after step 6
    assert last.memory_parts is None
    assert first.memory_parts is not None
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights <= first.memory_parts["weights"] < 1.1 * weights  # and the rotary embedding's buffers
    assert first.memory_parts["gradients"] == weights
    assert 2 * weights <= first.memory_parts["optimizer"] < 2.1 * weights
    assert first.memory_parts.keys() <= {"weights", "gradients", "optimizer", "activations"}
    assert first.memory is not None
    assert list(first.memory) == ["cuda:0" if torch.cuda.is_available() else "cpu"]
