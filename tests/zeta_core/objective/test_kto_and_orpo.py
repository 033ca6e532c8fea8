"""KTO and ORPO: the losses of TRL, independence of the split into micro-batches, and exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import ByT5Tokenizer

from tests.zeta_core.models import llama
from tests.zeta_core.objective.test_preference import dpo, pair_rows, rewards_in, tokens_of, write_pairs
from tests.zeta_core.parallel.test_parallel import case, results
from tests.zeta_core.runs import stopping_after, train
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.data.tokens import TokenFile
from zeta_core.environment import ProcessRank
from zeta_core.failures import CannotResume, InvalidData
from zeta_core.objective.loss_probe import find_loss_function
from zeta_core.objective.preference import LabeledAnswers, Pairs, preference_loss
from zeta_core.parallel.processes import Processes, Replicated
from zeta_core.plan import PlanInputs, decide_plan


def labeled_rows(number: int) -> list[dict[str, Any]]:
    """The answers of `pair_rows`, with a label each; every third one is undesirable."""
    rows = pair_rows(number)
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if at % 3 == 2 else "chosen"], "label": at % 3 != 2}
        for at, row in enumerate(rows)
    ]


def labeled(tmp_path: Path, number: int, **more: Any) -> dict[str, Any]:
    path = tmp_path / "answers.jsonl"
    if not path.exists():
        write_pairs(path, labeled_rows(number))
    return {"dataset": {"path": str(path)}, "method": "kto", "seq_len": 64, "learning_rate": 1e-3, **more}


def changed(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def log_probability(model: Any, prompt: np.ndarray[Any, Any], answer: np.ndarray[Any, Any]) -> torch.Tensor:
    """The log-probability of the answer after the prompt, computed token by token."""
    ids = torch.from_numpy(np.concatenate((prompt, answer)).astype(np.int64))
    logits = model(ids[None], use_cache=False).logits[0].double()
    return torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[len(prompt) - 1 :].sum()


def divided(tokens: TokenFile, document: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    assert tokens.supervised is not None
    own = slice(int(tokens.offsets[document]), int(tokens.offsets[document + 1]))
    ids, trained = np.asarray(tokens.ids[own]), np.asarray(tokens.supervised[own])
    return ids[~trained], ids[trained]


# --- The losses -------------------------------------------------------------------------------------------------------


def test_the_loss_of_kto_is_that_of_trl(tmp_path: Path) -> None:
    """TRL's `KTOTrainer.kto_loss`, and its divergence from answers after other prompts, written out by hand."""
    model, before = changed(llama()), llama().eval()
    tokens = tokens_of(tmp_path, labeled_rows(6), ByT5Tokenizer(), method="kto")
    answers = LabeledAnswers(tokens, 64, overlong=None)
    beta, weights = 0.3, (1.5, 0.7)
    gains: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    mismatched: list[torch.Tensor] = []
    with torch.no_grad():
        for number in range(6):
            (prompt, answer), (_, other) = divided(tokens, number), divided(tokens, (number + 3) % 6)
            reference = log_probability(before, prompt, answer)
            answers.reference_R[number] = reference
            answers.mismatched.reference_R[number] = other_reference = log_probability(before, prompt, other)
            gains[number % 3 != 2].append(log_probability(model, prompt, answer) - reference)
            mismatched.append(log_probability(model, prompt, other) - other_reference)
    chosen, rejected = torch.stack(gains[True]), torch.stack(gains[False])
    kl = torch.stack(mismatched).mean().clamp(min=0)
    losses = torch.cat(
        (weights[0] * (1 - F.sigmoid(beta * (chosen - kl))), weights[1] * (1 - F.sigmoid(beta * (kl - rejected))))
    )

    loss_function = preference_loss(
        find_loss_function(model, sample_ids=[5, 6, 7, 8]), "kto", "llama", beta=beta, weights=weights
    )
    engine = single_process_engine(model)
    every = np.arange(6)
    found: list[float] = []
    gradients: list[torch.Tensor] = []
    for micro_batch in (6, 4):
        loss_function.before_batch(engine, answers, every, micro_batch)
        assert answers.divergence == pytest.approx(kl.item(), abs=1e-4)
        parts = [every[at : at + micro_batch] for at in range(0, 6, micro_batch)]
        total = torch.stack([loss_function(model, answers.batch(part, len(part)))[0] for part in parts]).sum()
        found.append(total.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]))
    assert loss_function.before_batch(engine, answers, every, 4, lambda: "pause") == "pause", "it may take long"
    assert found == pytest.approx([losses.sum().item()] * 2, abs=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    sums = loss_function.take_sums()
    assert sums is not None
    rewards = loss_function.metrics((sums / 2).tolist()).rewards
    assert rewards is not None
    assert rewards["chosen"] == pytest.approx(beta * chosen.mean().item(), abs=1e-4)
    assert rewards["rejected"] == pytest.approx(beta * rejected.mean().item(), abs=1e-4)
    assert rewards["kl"] == pytest.approx(kl.item(), abs=1e-4)


def single_process_engine(model: Any) -> Replicated:
    """An engine that evaluates ``model`` in this process."""
    options = TrainerOptions.model_validate({"batch_size": 1, "max_steps": 1})
    plan = decide_plan(options, PlanInputs(1, "cpu", False, 1, 64, 1, 1 << 30, True, "data"), None)
    return Replicated(model, plan, Processes(ProcessRank(), need_group=False), blocks=[])


def test_the_loss_of_orpo_is_that_of_trl(tmp_path: Path) -> None:
    """TRL's `ORPOTrainer.odds_ratio_loss`, and the mean loss of the chosen answers as in the paper."""
    model = changed(llama())
    tokens = tokens_of(tmp_path, pair_rows(5), ByT5Tokenizer(), method="orpo")
    pairs, beta = Pairs(tokens, 64, overlong=None), 0.3
    expected = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for pair in range(5):
            parts = [divided(tokens, document) for document in (2 * pair, 2 * pair + 1)]
            chosen, rejected = (log_probability(model, p, answer) / len(answer) for p, answer in parts)
            log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
            expected += -chosen - beta * F.logsigmoid(log_odds)
    loss_function = preference_loss(find_loss_function(model, sample_ids=[5, 6, 7, 8]), "orpo", "llama", beta=beta)
    total, _ = loss_function(model, pairs.batch(np.arange(5), 5))
    assert total.item() == pytest.approx(expected.item(), abs=1e-4)
    parts = [loss_function(model, pairs.batch(np.array(rows), n))[0] for rows, n in (([0, 1, 0], 2), ([2, 3, 4], 3))]
    assert sum(part.item() for part in parts) == pytest.approx(total.item(), abs=1e-5)


# --- Data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["yes", None, 2, 0.5])
def test_a_label_that_is_not_true_or_false_is_rejected(label: object, tmp_path: Path) -> None:
    rows = [*labeled_rows(2), {"prompt": "Say 2: ", "completion": "yes", "label": label}]
    with pytest.raises(InvalidData, match=r"line 3: 'label' is .*; it must be true or false"):
        tokens_of(tmp_path, rows, ByT5Tokenizer(), method="kto")


def test_labels_belong_to_kto_and_pairs_do_not(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="use rows with prompt, completion and label"):
        tokens_of(tmp_path, [{"text": "words"}], ByT5Tokenizer(), method="kto")
    with pytest.raises(InvalidData, match="which method 'kto' does not support; set method to 'dpo' or 'orpo'"):
        tokens_of(tmp_path, pair_rows(2), ByT5Tokenizer(), method="kto")
    with pytest.raises(InvalidData, match="at least two answers"):
        LabeledAnswers(tokens_of(tmp_path, labeled_rows(1), ByT5Tokenizer(), method="kto"), 64, overlong=None)


def test_an_answer_after_another_prompt_is_cut_to_the_length_of_a_sequence(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p" * 20, "completion": "a", "label": True},
        {"prompt": "q", "completion": "b" * 20, "label": False},
    ]
    tokens = tokens_of(tmp_path, rows, ByT5Tokenizer(), method="kto")
    answers = LabeledAnswers(tokens, 24, overlong=None)
    batch = answers.mismatched.batch(np.array([0, 1]), 2)
    assert ByT5Tokenizer().decode(batch.ids_BT[0]) == "p" * 20 + "b" * 4
    assert (batch.labels_BT[0] != -100).tolist() == [False] * 20 + [True] * 4
    assert ByT5Tokenizer().decode(batch.ids_BT[1][:3]) == "qa</s>"
    assert (batch.labels_BT[1] != -100).sum() == 2


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.extended
@pytest.mark.parametrize("method", ["kto", "orpo"])
def test_the_margin_grows_and_a_resumed_run_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    base = llama(attention_dropout=0.1)
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    data = labeled(tmp_path, 40) if method == "kto" else {**dpo(40, tmp_path), "method": "orpo"}
    options: dict[str, Any] = data | {"max_steps": 12, "eval_split": 0.2, "eval_steps": 6, "checkpointing_steps": 100}
    options |= {"learning_rate": 1e-2, "warmup_steps": 0, method: {"beta": 0.5}, "lora": {"r": 4, "lora_dropout": 0.1}}
    other: dict[str, Any] = {**options, method: {"beta": 0.4}}
    model = str(tmp_path / "base")
    _, lines = train(model, tmp_path / "straight", cache=tmp_path, **options)
    rewards = rewards_in(lines)
    assert rewards[-1]["margin"] > rewards[0]["margin"] + 0.2
    assert rewards[-1]["accuracy"] > 0.8
    assert lines.evaluations[12] < lines.evaluations[6]
    resolved = lines.resolved_spec
    assert (resolved[method]["beta"], resolved["dpo"], resolved["method"]) == (0.5, None, method)

    stop = stopping_after(6)  # the next check is within the evaluation of step 6
    stopped, lines = train(model, tmp_path / "halves", cache=tmp_path, stop=stop, **options)
    assert (stopped.stopped, stopped.progress.step, lines.evaluations) == ("hand_back", 6, {})
    with pytest.raises(CannotResume, match=rf"{method}\.beta is 0\.4, but the run was started with 0\.5"):
        train(model, tmp_path / "halves", cache=tmp_path, resume=True, **other)
    train(model, tmp_path / "halves", cache=tmp_path, resume=True, **options)
    files = [(tmp_path / run / "final" / "adapter_model.safetensors").read_bytes() for run in ("straight", "halves")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_several_processes_learn_the_same_from_labels_as_one(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "answers.jsonl", labeled_rows(40))
    options: dict[str, Any] = {"dataset": {"path": str(path)}, "method": "kto", "eval_split": 0.2, "eval_steps": 5}
    split: dict[str, Any] = {"batch_size": 3, "gradient_accumulate_every": 4, "max_steps": 5, "seed": 42}
    alone = train(llama(tie_word_embeddings=True), tmp_path / "alone", cache=tmp_path, **split, **options)[0].result
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    cases = [case(name, world=2, model="tied llama", **options, **more) for name, more in strategies.items()]
    for name, result in results(tmp_path, 2, cases).items():
        assert result["loss"] == pytest.approx(alone.train_loss, abs=1e-5), name
        assert result["eval_loss"] == pytest.approx(alone.eval_loss, abs=1e-5), name
