"""Evaluation: the correct loss without side effects on training, the best checkpoint, early stopping and samples."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.zeta_core.data.token_files import random_documents
from tests.zeta_core.models import WithLabels, WithReturnLoss, WithTargets, llama, plain
from tests.zeta_core.runs import train
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.job.events import CheckpointLine, WarningLine
from zeta_core.contract.job.status import StopAction
from zeta_core.data.tokens import TokenFile
from zeta_core.data.tokens.held_out import hold_out
from zeta_core.failures import InvalidData

HELD_OUT = "The quick brown fox jumps over the lazy dog, again and again, until the evening comes and it is dark. "


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    """Documents of several lengths; one is too short to contain a target."""
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": HELD_OUT[:length]}) + "\n" for length in (90, 33, 1, 64, 7, 50)))
    return str(path)


def documents(tokens: TokenFile) -> set[tuple[int, ...]]:
    offsets = tokens.offsets
    return {
        tuple(int(i) for i in tokens.ids[tokens.where(np.arange(offsets[d], offsets[d + 1]))])
        for d in range(tokens.num_documents)
    }


# --- Held-out documents ----------------------------------------------------------------------------------------------


def test_a_share_of_the_documents_is_held_out_by_seed_and_the_rest_is_trained_on() -> None:
    tokens = random_documents([5 + number % 7 for number in range(40)])
    split = hold_out(tokens, 0.2, seed=1)
    train_documents, eval_documents = documents(split.train), documents(split.held_out)
    assert (len(train_documents), len(eval_documents)) == (32, 8)
    assert train_documents | eval_documents == documents(tokens)
    again, other = hold_out(tokens, 0.2, seed=1), hold_out(tokens, 0.2, seed=2)
    assert documents(again.held_out) == eval_documents != documents(other.held_out)
    assert len({part.fingerprint for part in (split.train, split.held_out, other.train, tokens)}) == 4


def test_the_end_of_a_single_long_document_is_held_out() -> None:
    tokens = random_documents([3, 200])
    split = hold_out(tokens, 0.1, seed=1)
    assert (split.train.num_tokens, split.held_out.num_tokens) == (183, 20)
    (whole,) = (d for d in documents(tokens) if len(d) == 200)
    assert documents(split.held_out) == {whole[180:]}
    with pytest.raises(InvalidData, match=r"eval_split is 0\.1"):
        hold_out(random_documents([3]), 0.1, seed=1)


# --- The loss ---------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, file: str, *, seq_len: int, pack: bool) -> float:
    """The loss of all tokens with a predecessor in their sequence, computed one document at a time."""
    rows = [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]
    texts = [[byte + 3 for byte in row.encode()] + [1] for row in rows]
    pieces: list[list[int]] = []
    at = 0
    for ids in texts:
        room = seq_len - at % seq_len if pack else seq_len
        pieces += [ids[:room], *(ids[start : start + seq_len] for start in range(room, len(ids), seq_len))]
        at += len(ids)
    total = count = 0.0
    model.eval()
    with torch.no_grad():
        for piece in (piece for piece in pieces if len(piece) > 1):
            answer: Any = model(torch.tensor([piece]))
            logits = getattr(answer, "logits", answer)[0]
            total += float(F.cross_entropy(logits[:-1].double(), torch.tensor(piece[1:]), reduction="sum"))
            count += len(piece) - 1
    return total / count


@pytest.mark.parametrize("pack", [True, False])
def test_the_loss_is_over_every_held_out_token_once(pack: bool, held_out: str, tmp_path: Path) -> None:
    model = llama()
    outcome, lines = train(
        model, tmp_path / "out", cache=tmp_path, max_steps=4, eval_dataset={"path": held_out}, eval_steps=2, pack=pack
    )
    assert list(lines.evaluations) == [2, 4]
    assert outcome.result.eval_loss == lines.evaluations[4]
    assert outcome.result.eval_loss == pytest.approx(by_hand(model, held_out, seq_len=32, pack=pack), abs=1e-6)
    manifest = json.loads((tmp_path / "out" / "final" / "manifest.json").read_text())
    assert manifest["metrics"]["eval_loss"] == outcome.result.eval_loss
    assert manifest["metrics"]["perplexity"] == pytest.approx(math.exp(lines.evaluations[4]))


@pytest.mark.parametrize("build", [WithTargets, WithReturnLoss, WithLabels])
def test_every_kind_of_model_is_evaluated_and_those_with_logits_write(
    build: type[nn.Module], held_out: str, tmp_path: Path
) -> None:
    _, lines = train(build(), tmp_path / "out", cache=tmp_path, max_steps=2, eval_dataset={"path": held_out})
    assert list(lines.evaluations) == [1, 2]
    assert len(lines.samples) == (0 if build is WithLabels else 6)


def test_samples_answer_the_prompts_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    questions = ["Hi", "Who is there?", "And then?", "How are you?", "Where to now, then?", "?" * 200]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": "Fine."}] for q in questions]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    held_out: dict[str, Any] = {"eval_dataset": {"path": str(path)}, "dataset": {"path": str(path)}}
    _, lines = train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1, seq_len=128, **held_out)
    options = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        for question in ("And then?", "How are you?", "Who is there?")  # the three that differ least in length
    ]
    assert [line.prompt for line in lines.samples] == options
    warnings = [
        line.message for line in lines.all if isinstance(line, WarningLine) and line.code == "documents_dropped"
    ]
    data = lines.resolved_spec["data_report"]
    assert (data["documents"], data["truncated"], data["dropped"], data["lengths"]["max"]) == (6, 0, 1, 266)
    assert warnings[0].startswith("1 of 6 documents are not trained on, because they are longer than seq_len")
    assert warnings[1].startswith(
        "1 of 6 held-out documents are not evaluated on, because they are longer than seq_len"
    )


# --- No side effects --------------------------------------------------------------------------------------------------


def test_a_run_with_evaluations_trains_to_the_same_bits_as_one_without(held_out: str, tmp_path: Path) -> None:
    evaluating: dict[str, Any] = {"eval_dataset": {"path": held_out}, "eval_steps": 1}
    losses: list[dict[int, float]] = []
    for name, more in (("with", evaluating), ("again", evaluating), ("without", {})):
        _, lines = train(lambda: plain(dropout=0.3), tmp_path / name, cache=tmp_path, max_steps=5, **more)
        losses.append(lines.evaluations)
        if more:
            assert [line.prompt for line in lines.samples[:3]] == [HELD_OUT[:16], HELD_OUT[:16], HELD_OUT[:16]]
            assert {line.text for line in lines.samples[:3]} != {line.text for line in lines.samples[-3:]}
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("with", "again", "without")]
    assert weights[0] == weights[1] == weights[2]
    assert losses[0] == losses[1]


# --- Consequences -----------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_the_best_checkpoint_is_kept_and_the_run_stops_early(tmp_path: Path) -> None:
    """Learning English makes a model worse at noise, soon after it has learned the range of the ids."""
    noise = np.random.default_rng(0).integers(3, 380, size=400).astype(np.uint16)
    np.save(tmp_path / "noise.npy", noise)
    text = np.frombuffer((HELD_OUT * 60).encode(), dtype=np.uint8).astype(np.uint16) + np.uint16(3)
    np.save(tmp_path / "text.npy", text)
    options: dict[str, Any] = {
        "dataset": {"path": str(tmp_path / "text.npy")},
        "eval_dataset": {"path": str(tmp_path / "noise.npy")},
        "use_pretokenized": True,
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "lr_scheduler": "constant",
        "learning_rate": 3e-2,
        "checkpointing_steps": 4,
    }
    out = tmp_path / "out"
    outcome, lines = train(plain, out, cache=tmp_path, max_steps=50, **options)
    best = min(lines.evaluations, key=lambda step: lines.evaluations[step])
    end = best + 2 * 2
    assert 0 < best < 20
    assert list(lines.evaluations) == list(range(2, end + 1, 2))
    assert lines.samples == []  # the tokenizer of the ids is unknown
    assert (outcome.progress.step, outcome.steps_trained, outcome.stopped) == (end, end, None)
    assert (outcome.result.best_checkpoint, outcome.best_checkpoint) == ("best", out / "best")
    manifests = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/manifest.json")}
    assert manifests.keys() == {*(f"step-{step}" for step in list(range(4, end + 1, 4))[-3:]), "best", "final"}
    assert (manifests["best"]["step"], manifests["final"]["step"]) == (best, end)
    for manifest in manifests.values():
        assert manifest["metrics"]["eval_loss"] == lines.evaluations[manifest["step"]]
    assert (out / "best" / "training_state" / "state.json").is_file()

    again, lines = train(plain, out, cache=tmp_path, resume=True, max_steps=60, **options)
    assert (again.steps_trained, again.result) == (0, outcome.result)
    assert any("stopped early" in str(getattr(line, "message", "")) for line in lines.all)

    # Resuming in another output_dir copies the best checkpoint there.
    elsewhere = tmp_path / "elsewhere"
    moved, lines = train(plain, elsewhere, cache=tmp_path, resume=out / "final", max_steps=50, **options)
    assert (moved.result, moved.best_checkpoint) == (outcome.result, elsewhere / "best")
    assert [(line.name, line.step) for line in lines.all if isinstance(line, CheckpointLine)] == [
        ("final", end),
        ("best", best),
    ]
    assert json.loads((elsewhere / "best" / "manifest.json").read_text())["files"] == manifests["best"]["files"]
    shutil.rmtree(out / "best")
    moved, lines = train(plain, tmp_path / "third", cache=tmp_path, resume=out / "final", max_steps=50, **options)
    assert (moved.result.best_checkpoint, moved.best_checkpoint) == (None, None)
    assert any(getattr(line, "code", None) == "no_best_checkpoint" for line in lines.all)


@pytest.mark.extended
def test_a_run_stopped_within_an_evaluation_resumes_to_the_same_bits(held_out: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_dataset": {"path": held_out}, "eval_steps": 3, "max_steps": 9, "seed": 3}
    options |= {"early_stopping_patience": 2}
    straight, lines = train(lambda: plain(dropout=0.1), tmp_path / "straight", cache=tmp_path, **options)
    times = 0

    def stop() -> StopAction | None:
        nonlocal times
        times += 1  # once after each step, once within each evaluation
        return "pause" if times == 8 else None

    first, before = train(lambda: plain(dropout=0.1), tmp_path / "parts", cache=tmp_path, stop=stop, **options)
    assert (first.stopped, first.progress.step, list(before.evaluations)) == ("pause", 6, [3])
    assert (tmp_path / "parts" / "step-6").is_dir()
    second, after = train(lambda: plain(dropout=0.1), tmp_path / "parts", cache=tmp_path, resume=True, **options)
    assert before.evaluations | after.evaluations == lines.evaluations
    of_this_run: dict[str, Any] = {"train_seconds": 0, "memory": None}
    assert second.result.model_copy(update=of_this_run) == straight.result.model_copy(update=of_this_run)
    for name in ("final", "best"):
        files = [tmp_path / folder / name / "model.safetensors" for folder in ("straight", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.parametrize("field", ["eval_steps", "early_stopping_patience"])
def test_options_about_evaluations_require_held_out_data(field: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {field: 2}
    with pytest.raises(InvalidSpec, match=f"{field} is 2; there is no evaluation data; set eval_split"):
        train(plain, tmp_path / "out", cache=tmp_path, **options)


def test_the_held_out_documents_are_recorded_and_kept_on_resume(held_out: str, tmp_path: Path) -> None:
    _, lines = train(plain, tmp_path / "out", cache=tmp_path, max_steps=2, eval_split=0.1, lr_scheduler="constant")
    resolved = lines.resolved_spec
    assert (resolved["eval_split"], resolved["eval_steps"], resolved["eval_documents"]) == (0.1, 1, 8)
    outcome, _ = train(plain, tmp_path / "out", cache=tmp_path, resume=True, max_steps=3, lr_scheduler="constant")
    assert outcome.progress.evaluated_step == 3
