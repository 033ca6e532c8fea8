"""The loss on each held-out document: exact, stored with the final checkpoint, and without effect on the training."""

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.models import WithLabels, WithTargets, llama, plain
from tests.zeta_core.runs import train
from zeta_core.checkpoint.training_state import read_training_state
from zeta_core.contract.job.comparison import DocumentLosses
from zeta_core.contract.spec.sources import PathSource
from zeta_core.data.sequences import Sequences
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import prepare_tokens
from zeta_core.environment import ProcessRank
from zeta_core.objective import document_losses
from zeta_core.objective.document_losses import DocumentEvaluator
from zeta_core.objective.loss_probe import find_loss_function
from zeta_core.parallel.processes import Processes
from zeta_core.report.reporter import Reporter

LENGTHS = (90, 33, 1, 64, 7, 50, 20, 41)
TEXT = "The quick brown fox jumps over the lazy dog, again and again, until the evening comes and it is dark. "


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[:length]}) + "\n" for length in LENGTHS))
    return str(path)


def losses_of(output_dir: Path, name: str = "final") -> DocumentLosses:
    found = read_training_state(output_dir / name).document_losses()
    assert found is not None
    return found


def loss_by_hand(model: nn.Module, text: str, seq_len: int) -> float:
    """The sum over the targets of one document, which is cut into parts of ``seq_len``."""
    ids = [byte + 3 for byte in text.encode()] + [1]
    total = 0.0
    parts = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    model.eval()
    with torch.no_grad():
        for part in (part for part in parts if len(part) > 1):
            output: Any = model(torch.tensor([part]))
            logits = getattr(output, "logits", output)[0]
            total += float(F.cross_entropy(logits[:-1], torch.tensor(part[1:]), reduction="sum"))
    return total


@pytest.mark.parametrize("build", [llama, plain])
def test_the_losses_are_those_of_each_document_alone(tmp_path: Path, held_out: str, build: Any) -> None:
    data: dict[str, Any] = {"dataset": {"builtin": "python-docs"}, "eval_dataset": {"path": held_out}}
    model = build()
    outcome, _ = train(model, tmp_path / "run", cache=tmp_path, max_steps=3, eval_steps=3, **data)
    assert outcome.checkpoint is not None
    found = losses_of(tmp_path / "run")
    texts = [TEXT[:length] for length in LENGTHS]
    assert (found.step, found.num_held_out) == (3, len(LENGTHS))
    assert found.losses == pytest.approx([loss_by_hand(model, text, 32) for text in texts], rel=1e-5)
    assert sum(found.num_targets) == sum(length - math.ceil((length + 1) / 32) + 1 for length in LENGTHS)
    assert losses_of(tmp_path / "run", "best") == found, "the last step is the best one here"


def test_documents_that_are_computed_together_have_the_losses_of_single_ones(tmp_path: Path, held_out: str) -> None:
    sources = open_sources([PathSource(path=held_out)], SourceLocations(any_path=True), pretokenized=False)
    tokens = prepare_tokens(sources, byte_tokenizer(None), tmp_path, Reporter())
    parts = Sequences(tokens, 32, pack=False)
    model = llama().eval()
    loss_function = find_loss_function(model, sample_ids=[5, 9, 7, 8, 6, 4], largest_id=tokens.largest_id)
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    found: list[tuple[DocumentLosses, float | None, int]] = []
    for function in (loss_function, replace(loss_function, head=None), replace(loss_function, looks_ahead=True)):
        with closing(Processes(ProcessRank(), need_group=False)) as processes, torch.no_grad():
            evaluator = DocumentEvaluator(tokens, parts, function, processes, torch.device("cpu"))
            num_calls = 0
            with model.register_forward_hook(count):
                losses = evaluator.evaluate(model, 0, lambda: None)
        assert isinstance(losses, DocumentLosses)
        sums = function.take_sums()
        assert sums is not None
        found.append((losses, function.metrics(sums.tolist()).token_accuracy, num_calls))
    for losses, accuracy, _ in found[:2]:
        assert losses.losses == pytest.approx(found[2][0].losses, abs=1e-4)
        assert losses.num_targets == found[2][0].num_targets
        assert accuracy == found[2][1]
    assert [calls for _, _, calls in found] == [1, 1, len(parts)]


@pytest.mark.parametrize("build", [WithTargets, WithLabels])
def test_a_model_that_returns_only_means_is_measured_too(tmp_path: Path, held_out: str, build: Any) -> None:
    data: dict[str, Any] = {"dataset": {"builtin": "python-docs"}, "eval_dataset": {"path": held_out}, "pack": False}
    outcome, _ = train(build(), tmp_path / "run", cache=tmp_path, max_steps=2, eval_steps=2, **data)
    assert losses_of(tmp_path / "run").mean_loss == pytest.approx(outcome.result.eval_loss, rel=1e-5)


@pytest.mark.extended
def test_document_losses_change_nothing_in_a_run(
    tmp_path: Path, held_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: dict[str, Any] = {"dataset": {"builtin": "python-docs"}, "eval_dataset": {"path": held_out}}
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr("zeta_core.run.assembly.MIN_DOCUMENTS", 10**6)
        train(llama(), tmp_path / name, cache=tmp_path, max_steps=4, eval_steps=2, checkpointing_steps=4, **data)
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("with", "without")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert read_training_state(tmp_path / "without" / "final").document_losses() is None
    assert read_training_state(tmp_path / "with" / "step-4").document_losses() == losses_of(tmp_path / "with")


def test_too_many_documents_are_sampled_evenly(tmp_path: Path, held_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_losses, "MAX_DOCUMENTS", 5)
    data: dict[str, Any] = {"dataset": {"builtin": "python-docs"}, "eval_dataset": {"path": held_out}}
    train(plain(), tmp_path / "run", cache=tmp_path, max_steps=2, eval_steps=2, **data)
    found = losses_of(tmp_path / "run")
    assert (len(found.losses), found.num_held_out) == (5, len(LENGTHS))
