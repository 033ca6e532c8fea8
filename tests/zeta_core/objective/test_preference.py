"""DPO and IPO: the losses are the published ones, the reference is constant, and runs learn the preferences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.data.conversations import documents
from tests.zeta_core.models import WithLabels, llama
from tests.zeta_core.parallel.test_parallel import case, results, why_no_deepspeed
from tests.zeta_core.runs import RecordedLines, stopping_after, train
from zeta_core.contract.job.events import ProgressLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.failures import InvalidData, InvalidModel
from zeta_core.objective.loss_probe import find_loss_function
from zeta_core.objective.preference import Pairs, preference_loss
from zeta_core.report.reporter import Reporter


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Prompts whose chosen answers are words and whose rejected answers are noise."""
    noise = np.random.default_rng(0)
    return [
        {
            "prompt": f"Say {number}: ",
            "chosen": "yes it is " * (1 + number % 2),
            "rejected": "".join(chr(int(c)) for c in noise.integers(33, 126, 12)),
        }
        for number in range(count)
    ]


def tokens_of(tmp_path: Path, rows: list[Any], tokenizer: Any, *, method: str = "dpo") -> TokenFile:
    path = write_pairs(tmp_path / "pairs.jsonl", rows)
    options = parse(TrainerOptions, {"dataset": {"path": str(path)}})
    sources = open_sources(
        dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False, method=method
    )
    return prepare_tokens(sources, tokenizer, tmp_path / "cache", Reporter(), method=method)


def rewards_in(lines: RecordedLines) -> list[dict[str, float]]:
    return [line.rewards for line in lines.all if isinstance(line, ProgressLine) and line.rewards is not None]


def dpo(rows: int, tmp_path: Path, **more: Any) -> dict[str, Any]:
    path = tmp_path / "pairs.jsonl"
    if not path.exists():
        write_pairs(path, pair_rows(rows))
    return {"dataset": {"path": str(path)}, "method": "dpo", "seq_len": 64, "learning_rate": 1e-3, **more}


# --- Data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "learned"),
    [
        ({"prompt": "Hi", "chosen": " yes", "rejected": " no"}, [" yes<|end|>", " no<|end|>"]),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "chosen": [{"role": "assistant", "content": "yes"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            },
            ["yes<|im_end|>\n", "no<|im_end|>\n"],
        ),
        (
            {  # two complete conversations with the same beginning
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}],
            },
            ["yes<|im_end|>\n", "no<|im_end|>\n"],
        ),
        (
            {  # the prompt is also given separately
                "prompt": [{"role": "user", "content": "Hi"}],
                "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}],
                "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}],
            },
            ["yes<|im_end|>\n", "no<|im_end|>\n"],
        ),
        ({"chosen": "Q: Hi A: yes", "rejected": "Q: Hi A: yet no"}, [" yes<|end|>", " yet no<|end|>"]),
        (
            {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "yes", "rejected": "no"},
            ["yes<|im_end|>\n", "no<|im_end|>\n"],
        ),
    ],
    ids=[
        "text",
        "messages",
        "conversations",
        "conversations with their prompt",
        "texts that begin alike",
        "messages and texts",
    ],
)
def test_both_answers_are_learned_after_the_same_prompt(row: Any, learned: list[str], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.CHATML)
    learned_documents = documents(tokens_of(tmp_path, [row], tokenizer), tokenizer)
    assert [learned_texts for _, learned_texts in learned_documents] == [[learned[0]], [learned[1]]]
    assert learned_documents[0][0].removesuffix(learned[0]) == learned_documents[1][0].removesuffix(learned[1])
    assert learned_documents[0][0].count("Hi") == 1


def test_answers_to_different_prompts_are_rejected(tmp_path: Path) -> None:
    conversations = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in ("Hi", "Bye")
    ]
    with pytest.raises(InvalidData, match=r"^pairs\.jsonl, line 1: chosen and rejected answer different prompts"):
        tokens_of(
            tmp_path,
            [{"chosen": conversations[0], "rejected": conversations[1]}],
            byte_tokenizer(chat_templates.CHATML),
        )


def test_pairs_are_for_dpo_and_dpo_is_for_pairs(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="preference rows, which method 'sft' does not support; set method to 'dpo'"):
        tokens_of(tmp_path, pair_rows(2), ByT5Tokenizer(), method="sft")
    with pytest.raises(
        InvalidData, match="text rows, which method 'dpo' does not support; use rows with prompt, chosen"
    ):
        tokens_of(tmp_path, [{"text": "words"}], ByT5Tokenizer())


def test_a_pair_is_kept_or_dropped_as_one(tmp_path: Path) -> None:
    rows = [*pair_rows(2), {"prompt": "x" * 90, "chosen": "a", "rejected": "b"}]
    tokens = tokens_of(tmp_path, rows, ByT5Tokenizer())
    pairs = Pairs(tokens, 64, overlong=None)
    assert len(pairs) == 2
    assert pairs.overlong_counts.dropped_at == "pairs.jsonl, line 3"
    assert pairs.num_targets(np.array([0, 1])) == 2
    assert pairs.num_tokens(np.array([1])) == int(tokens.offsets[4] - tokens.offsets[2])
    both = np.array([0, 1])
    assert pairs.batch(both, 2).ids_BT.numel() == len(both) * pairs.widths(both).max()


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_loss_and_rewards_are_those_of_the_published_formula(tmp_path: Path) -> None:
    """Rafailov et al. 2023, equation 7, and Azar et al. 2023, equation 17, written out token by token.

    As in TRL, the log-probabilities of IPO are means over the tokens of an answer.
    """
    model, before = llama(), llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tokens = tokens_of(tmp_path, pair_rows(5), ByT5Tokenizer())
    pairs = Pairs(tokens, 64, overlong=None)

    def log_probability(of: Any, document: int) -> float:
        start, end = int(tokens.offsets[document]), int(tokens.offsets[document + 1])
        ids = np.asarray(tokens.ids[start:end]).astype(np.int64)
        with torch.no_grad():
            log_probabilities = torch.log_softmax(
                of(torch.from_numpy(ids)[None], use_cache=False).logits[0].double(), -1
            )
        assert tokens.supervised is not None
        return sum(
            float(log_probabilities[at - 1, ids[at]]) for at in range(1, len(ids)) if tokens.supervised[start + at]
        )

    pairs.reference_R = np.array([log_probability(before, document) for document in range(10)], dtype=np.float32)
    beta, expected, expected_ipo, chosen, rejected = 0.3, 0.0, 0.0, [], []
    for pair in range(5):
        gains = [log_probability(model, d) - pairs.reference_R[d] for d in (2 * pair, 2 * pair + 1)]
        chosen.append(beta * gains[0])
        rejected.append(beta * gains[1])
        expected += -math.log(1 / (1 + math.exp(-beta * (gains[0] - gains[1]))))
        assert tokens.supervised is not None
        lengths = [int(tokens.supervised[slice(*tokens.offsets[d : d + 2])].sum()) for d in (2 * pair, 2 * pair + 1)]
        expected_ipo += (gains[0] / lengths[0] - gains[1] / lengths[1] - 1 / (2 * beta)) ** 2

    language_model_loss = find_loss_function(model, sample_ids=[5, 6, 7, 8])
    loss_function = preference_loss(language_model_loss, "dpo", "llama", beta=beta)
    model.eval()
    whole, _ = loss_function(model, pairs.batch(np.arange(5), 5))
    assert whole.item() == pytest.approx(expected, abs=1e-4)
    measures = loss_function.take_sums()
    assert measures is not None
    rewards = loss_function.metrics(measures.tolist()).rewards
    assert rewards is not None
    assert rewards["chosen"] == pytest.approx(np.mean(chosen), abs=1e-4)
    assert rewards["margin"] == pytest.approx(np.mean(chosen) - np.mean(rejected), abs=1e-4)
    assert rewards["accuracy"] == pytest.approx(np.mean(np.array(chosen) > np.array(rejected)))
    ipo = preference_loss(language_model_loss, "dpo", "llama", beta=beta, kind="ipo")
    ipo_loss, _ = ipo(model, pairs.batch(np.arange(5), 5))
    assert ipo_loss.item() == pytest.approx(expected_ipo, rel=1e-4)
    # Split in any way, with a filler pair, the losses and their gradient are the same.
    parts = [
        loss_function(model, pairs.batch(np.array(rows), count))[0] for rows, count in (([0, 1, 0], 2), ([4, 3, 2], 3))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), abs=1e-5)
    gradient = torch.autograd.grad(whole, list(model.parameters()))
    split = torch.autograd.grad(parts[0] + parts[1], list(model.parameters()))
    for ours, theirs in zip(gradient, split, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_model_without_logits_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="WithLabels returns a loss but no logits, and method 'dpo' needs"):
        train(WithLabels(), tmp_path / "out", cache=tmp_path, **dpo(4, tmp_path, max_steps=1))


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_dropout": 0.1}], ids=["all weights", "lora"])
def test_the_margin_grows_from_zero_and_a_resumed_run_ends_with_the_same_bits(lora: Any, tmp_path: Path) -> None:
    base = llama(attention_dropout=0.1)
    base.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    options = dpo(40, tmp_path, max_steps=12, eval_split=0.2, eval_steps=6, checkpointing_steps=100, learning_rate=1e-2)
    options |= {"lora": lora, "dpo": {"beta": 0.5}, "warmup_steps": 0}
    model = str(tmp_path / "base")
    straight, lines = train(model, tmp_path / "straight", cache=tmp_path, **options)
    rewards = rewards_in(lines)
    assert lines.evaluations[12] < math.log(2), "the model also prefers the chosen answers of held-out pairs"
    assert rewards[-1]["margin"] > 0.5
    assert rewards[-1]["accuracy"] > 0.9
    assert straight.result.train_loss is not None
    assert straight.result.train_loss < math.log(2)
    resolved = lines.resolved_spec
    assert resolved["dpo"] == {"loss": "sigmoid", "beta": 0.5}
    assert (resolved["train_on"], resolved["pack"]) == ("completion", False)
    assert not any(line.perplexity for line in lines.all if isinstance(line, ProgressLine))

    stopped, _ = train(model, tmp_path / "halves", cache=tmp_path, stop=stopping_after(7), **options)
    assert stopped.stopped == "hand_back"
    train(model, tmp_path / "halves", cache=tmp_path, resume=True, **options)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    files = [(tmp_path / run / "final" / name).read_bytes() for run in ("straight", "halves")]
    assert files[0] == files[1]


def test_the_first_loss_is_log_two_and_the_default_rate_is_that_of_dpo(tmp_path: Path) -> None:
    options = dpo(8, tmp_path, max_steps=1)
    del options["learning_rate"]
    outcome, lines = train(llama(), tmp_path / "out", cache=tmp_path, learning_rate=None, **options)
    assert outcome.result.train_loss == pytest.approx(math.log(2), abs=1e-6)
    assert lines.resolved_spec["learning_rate"] == 1e-6
    assert rewards_in(lines)[0] == {"chosen": 0.0, "rejected": 0.0, "margin": 0.0, "accuracy": 0.0}


def test_the_margin_of_ipo_approaches_its_limit(tmp_path: Path) -> None:
    """The loss draws the difference of the gains per token towards 1 / (2 beta), so the margin towards 1/2."""
    settings = {"beta": 0.5, "loss": "ipo"}
    options = dpo(8, tmp_path, max_steps=60, learning_rate=1e-3, warmup_steps=0, dpo=settings, lr_min=1e-5)
    _, lines = train(llama(), tmp_path / "out", cache=tmp_path, **options)
    assert lines.resolved_spec["dpo"] == {"loss": "ipo", "beta": 0.5}
    assert rewards_in(lines)[0]["margin"] == 0
    assert rewards_in(lines)[-1]["margin"] == pytest.approx(0.5, abs=0.1)
    rates = [line.learning_rate for line in lines.all if isinstance(line, ProgressLine) and line.learning_rate]
    assert rates[0] == 1e-3
    assert 1e-5 < rates[-1] < 2e-5


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_several_processes_learn_the_same_preferences_as_one(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", pair_rows(40))
    options: dict[str, Any] = {"dataset": {"path": str(path)}, "method": "dpo", "eval_split": 0.2, "eval_steps": 5}
    strategies: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}}
    if why_no_deepspeed() is None:
        strategies["zero-3"] = {"use_deepspeed": 3}
    split = {"batch_size": 3, "gradient_accumulate_every": 4, "max_steps": 5, "seed": 42}
    model = llama(tie_word_embeddings=True)
    alone = train(model, tmp_path / "alone", cache=tmp_path, **split, **options)[0].result
    cases = [case(name, world=2, model="tied llama", **options, **more) for name, more in strategies.items()]
    for name, result in results(tmp_path, 2, cases).items():
        assert result["loss"] == pytest.approx(alone.train_loss, abs=1e-5), name
        assert result["eval_loss"] == pytest.approx(alone.eval_loss, abs=1e-5), name
