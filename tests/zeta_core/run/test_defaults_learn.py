"""Fine-tuning with default settings teaches invented facts to a real model, from little data."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.harness.invented_chats import Fact, facts, write_held_out_chats, write_training_chats
from tests.harness.real_model import smollm2
from tests.zeta_core.advice_runs import apply_patch, warnings_by_code
from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from tests.zeta_core.models import llama
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import LogLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.plan import PlanInputs, SequenceStats, decide_plan
from zeta_core.run.resolved_spec import describe_defaults

DEFAULTS: dict[str, Any] = {
    "batch_size": None,
    "gradient_accumulate_every": None,
    "seq_len": None,
    "learning_rate": None,
}


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("number", "taught"), [(30, 10), (300, 50), (3000, 150)])
def test_conversations_teach_their_facts_with_default_settings(number: int, taught: int, tmp_path: Path) -> None:
    known = facts(taught)
    write_training_chats(tmp_path / "chats.jsonl", known, number)
    write_held_out_chats(tmp_path / "held-out.jsonl", known)
    _, lines = train(
        smollm2(),
        tmp_path / "out",
        cache=tmp_path,
        lora={},
        dataset={"path": str(tmp_path / "chats.jsonl")},
        eval_dataset={"path": str(tmp_path / "held-out.jsonl")},
        **DEFAULTS,
    )
    losses = list(lines.evaluations.values())
    answered = sum(fact.river in answer for fact, answer in _answers(known[:10], tmp_path))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert losses[-1] < 0.5 * losses[0]
    assert answered >= 5
    assert peak_bytes <= 4e9


@pytest.mark.extended
def test_little_data_is_trained_in_many_small_steps(tmp_path: Path) -> None:
    llama_in(tmp_path / "base")
    write_training_chats(tmp_path / "chats.jsonl", facts(10), 30)
    options: dict[str, Any] = {**DEFAULTS, "dataset": {"path": str(tmp_path / "chats.jsonl")}}
    outcome, lines = train(str(tmp_path / "base"), tmp_path / "few", cache=tmp_path, **options)
    resolved = lines.resolved_spec
    assert (resolved["epochs"], resolved["global_batch_size"], resolved["pack"]) == (3.0, 1, False)
    assert outcome.progress.step == 90
    assert "few_steps" not in warnings_by_code(lines)
    [sentence] = [line.message for line in lines.all if isinstance(line, LogLine) and "Defaults:" in line.message]
    assert sentence.startswith("Defaults: 3 epochs (fine-tuning); a global batch of 1 (about 1/64 of 30 sequences);")

    write_training_chats(tmp_path / "chats.jsonl", facts(50), 100)
    options["epochs"] = 0.1
    _, lines = train(str(tmp_path / "base"), tmp_path / "more", cache=tmp_path, **options)
    assert (lines.resolved_spec["global_batch_size"], lines.resolved_spec["pack"]) == (2, False)


@pytest.mark.extended
def test_a_run_with_few_steps_gets_a_warning_with_a_fix(tmp_path: Path) -> None:
    llama_in(tmp_path / "base")
    write_training_chats(tmp_path / "chats.jsonl", facts(3), 3)
    options: dict[str, Any] = {**DEFAULTS, "dataset": {"path": str(tmp_path / "chats.jsonl")}}
    _, lines = train(str(tmp_path / "base"), tmp_path / "few", cache=tmp_path, **options)
    advice = warnings_by_code(lines)["few_steps"]
    outcome, lines = train(
        str(tmp_path / "base"), tmp_path / "more", cache=tmp_path, **apply_patch(options, advice.patch)
    )
    assert outcome.progress.step >= 20
    assert "few_steps" not in warnings_by_code(lines)


@pytest.mark.parametrize(
    ("device", "unpacked_tokens", "packs"), [("cpu", 64, False), ("cpu", 1024, True), ("cuda", 64, True)]
)
def test_a_cpu_does_not_pack_more_than_fits_its_memory(device: str, unpacked_tokens: int, packs: bool) -> None:
    stats = {True: SequenceStats(100, 1024), False: SequenceStats(1000, unpacked_tokens)}
    facts = PlanInputs(
        1, device, False, 1, 1024, 1_000_000, 1 << 40, from_scratch=False, data="", stats_by_packing=stats
    )
    plan = decide_plan(parse(TrainerOptions, {}), facts, None)
    assert plan.pack is packs
    description = describe_defaults(parse(TrainerOptions, {}), plan, facts) or ""
    assert (
        "one packed sequence of 1,024 tokens exceeds the memory for activations on a CPU" in description
    ) is not packs


def test_a_resumed_run_keeps_its_epochs() -> None:
    facts = PlanInputs(1, "cpu", False, 1, 256, 1, 1 << 30, from_scratch=False, data="data")
    started = decide_plan(parse(TrainerOptions, {"epochs": 5}), facts, None)
    assert decide_plan(parse(TrainerOptions, {}), facts, started.stored()).epochs == 5
    assert decide_plan(parse(TrainerOptions, {"epochs": 6}), facts, started.stored()).epochs == 6
    assert decide_plan(parse(TrainerOptions, {}), facts, None).epochs == 3


def llama_in(folder: Path) -> None:
    """A small pretrained model with a chat template."""
    model: Any = llama()
    model.save_pretrained(folder)
    byte_tokenizer(CHATML).save_pretrained(folder)


def _answers(taught: list[Fact], folder: Path) -> list[tuple[Fact, str]]:
    """The greedy answers of the model to questions that are not in the training data."""
    located = locate_model(smollm2(), SourceLocations(any_path=True), folder)
    tokenizer: Any = locate_tokenizer(None, located, SourceLocations(any_path=True), folder)
    base: Any = located.build()
    model: Any = PeftModel.from_pretrained(base, str(folder / "out" / "final")).eval()
    found: list[tuple[Fact, str]] = []
    for fact in taught:
        turns = [{"role": "user", "content": fact.held_out_question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            written = model.generate(**ids, max_new_tokens=32, do_sample=False)
        found.append((fact, tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)))
    return found
