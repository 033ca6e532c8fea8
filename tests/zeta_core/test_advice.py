"""Each piece of advice is provoked by a real run; after applying its patch, it no longer appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.zeta_core.advice_runs import apply_patch, train, warnings_by_code
from tests.zeta_core.models import LLAMA_CONFIG, VOCABULARY, PlainModel, WithReturnLoss, llama, plain, summing
from zeta_core.contract.spec.sources import ConfigModel
from zeta_core.failures import InvalidData, InvalidModel, NonFiniteLoss, TrainingFailed, explain


def error_of(directory: Path, model: object, spec: dict[str, Any], error: type[TrainingFailed]) -> TrainingFailed:
    with pytest.raises(error) as raised:
        train(directory, model, spec)
    return raised.value


# --- Learning rates ---------------------------------------------------------------------------------------------------


def test_a_rate_far_too_high_gives_a_warning_and_then_divergence(
    tmp_path: Path,
) -> None:
    spec: dict[str, Any] = {"learning_rate": 3.0, "seq_len": 64, "max_steps": 40}
    _, lines = train(tmp_path, llama(), spec)
    found = warnings_by_code(lines)
    unusual, diverging = found["unusual_learning_rate"], found["diverging_loss"]
    first_step = next(index for index, line in enumerate(lines.all) if getattr(line, "step", None) == 1)
    assert lines.all.index(unusual) < first_step < lines.all.index(diverging)
    assert "for training from scratch with adamw" in unusual.message
    assert unusual.patch == {"learning_rate": 2e-3}
    assert diverging.patch == {"learning_rate": 2e-3, "warmup_steps": 0.1}
    evidence = diverging.evidence or {}
    assert float(evidence["smoothed_loss"]) > float(evidence["lowest_smoothed_loss"]) + 0.5  # pyright: ignore[reportArgumentType]
    assert len(evidence["recent"]) >= 5  # pyright: ignore[reportArgumentType]
    for advice in (unusual, diverging):
        outcome, lines = train(tmp_path, llama(), apply_patch(spec, advice.patch))
        assert not warnings_by_code(lines)
        assert (outcome.progress.train_loss or 9.0) < 5.9, "it learns: ln 384 is 5.95"


@pytest.mark.parametrize(
    ("spec", "training_kind"),
    [
        ({"lora": {}, "learning_rate": 0.5}, "training a LoRA adapter with adamw"),
        ({"optimizer": "lion", "learning_rate": 0.05}, "training from scratch with lion"),
        ({"optimizer": "sgd", "learning_rate": 1e-6}, "training from scratch with sgd"),
        ({"optimizer": "muon", "learning_rate": 0.5}, "training from scratch with muon"),
        ({"optimizer": "adafactor", "learning_rate": 1.0}, "training from scratch with adafactor"),
    ],
)
def test_usual_rates_depend_on_the_optimizer_and_the_kind_of_training(
    spec: dict[str, Any], training_kind: str, tmp_path: Path
) -> None:
    _, lines = train(tmp_path, llama(), {"max_steps": 1, **spec})
    unusual = warnings_by_code(lines)["unusual_learning_rate"]
    assert training_kind in unusual.message
    _, lines = train(tmp_path, llama(), apply_patch({"max_steps": 1, **spec}, unusual.patch))
    assert "unusual_learning_rate" not in warnings_by_code(lines)


# --- Numbers that are not finite --------------------------------------------------------------------------------------


def test_a_non_finite_loss_ends_the_run_with_its_history_and_a_patch(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1000.0, "max_grad_norm": 1e30, "max_steps": 20}
    error = error_of(tmp_path, plain(), spec, NonFiniteLoss)
    reason, explained = explain(error)
    assert (reason, explained.code) == ("non_finite_loss", "non_finite_loss")
    evidence = explained.evidence.model_extra or {}
    assert evidence["step"] > 1
    assert evidence["recent"][0].keys() == {"step", "loss", "learning_rate", "grad_norm"}
    assert evidence["recent"][-1]["step"] == evidence["step"] - 1
    assert evidence["ranks"] == [0]
    assert explained.patch is not None
    assert explained.patch["max_grad_norm"] == 1.0
    held_out = error_of(tmp_path, plain(), {**spec, "eval_split": 0.1, "eval_steps": 1}, NonFiniteLoss)
    assert held_out.message == f"The loss on the held-out data after step {held_out.evidence['step']} is not finite."
    assert held_out.patch == explained.patch
    assert "check the held-out data" in (held_out.hint or "")
    outcome, lines = train(tmp_path, plain(), apply_patch(spec, explained.patch))
    assert outcome.progress.step == 20
    assert not {"diverging_loss", "unusual_learning_rate"} & warnings_by_code(lines).keys()


class Large(PlainModel):
    """Activations beyond the largest number of fp16."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids) * 1e7) / 1e7


def test_a_model_that_overflows_fp16_is_patched_to_a_wider_precision(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"mixed_precision": "fp16", "max_steps": 2}
    error = error_of(tmp_path, Large(), spec, NonFiniteLoss)
    assert error.patch == {"mixed_precision": "bf16" if torch.cuda.is_available() else "no"}
    assert "65,504" in (error.hint or "")
    outcome, _ = train(tmp_path, Large(), apply_patch(spec, error.patch))
    assert outcome.progress.step == 2


def test_a_model_with_non_finite_weights_is_reported_without_a_patch(tmp_path: Path) -> None:
    broken = plain()
    with torch.no_grad():
        broken.get_parameter("blocks.1.up.weight")[0, 0] = float("nan")
    error = error_of(tmp_path, broken, {"max_steps": 2}, NonFiniteLoss)
    assert error.patch is None
    assert "blocks.1.up.weight" in (error.hint or "")
    assert error.evidence["tensors"] == ["weight of blocks.1.up.weight"]


class SteepAtZero(PlainModel):
    """A finite loss whose gradient is not a number, because it contains the square root of zero."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + torch.sqrt(0 * self.get_parameter("blocks.0.norm.bias").sum())


def test_a_non_finite_gradient_is_reported_with_its_origin(tmp_path: Path) -> None:
    error = error_of(tmp_path, SteepAtZero(), {"max_steps": 2}, NonFiniteLoss)
    assert error.message == "The gradient of step 1 is not finite; the update was not applied."
    assert error.evidence["tensors"] == ["gradient of blocks.0.norm.bias"]
    assert (error.evidence["ranks"], error.patch) == ([0], None)


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's precision is meant")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_precision_on_a_cpu_is_slow(precision: str, tmp_path: Path) -> None:
    spec = {"mixed_precision": precision, "max_steps": 1}
    _, lines = train(tmp_path, llama(), spec)
    slow = warnings_by_code(lines)["slow_precision"]
    _, lines = train(tmp_path, llama(), apply_patch(spec, slow.patch))
    assert not warnings_by_code(lines)


def test_training_a_bfloat16_model_in_fp16_gives_a_warning(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")  # pyright: ignore[reportCallIssue]
    spec: dict[str, Any] = {"mixed_precision": "fp16", "max_steps": 1, "learning_rate": 1e-4}
    _, lines = train(tmp_path, str(tmp_path / "model"), spec)
    narrow = warnings_by_code(lines)["narrow_precision"]
    assert narrow.evidence == {"stored": "bfloat16"}
    _, lines = train(tmp_path, str(tmp_path / "model"), apply_patch(spec, narrow.patch))
    assert not warnings_by_code(lines)


# --- Tokens, positions and documents ----------------------------------------------------------------------------------


def test_sequences_beyond_learned_positions_are_rejected_with_a_valid_length(tmp_path: Path) -> None:
    def gpt2() -> nn.Module:
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2))

    spec: dict[str, Any] = {"seq_len": 128, "max_steps": 1}
    error = error_of(tmp_path, gpt2(), spec, InvalidModel)
    assert (error.param, error.patch) == ("seq_len", {"seq_len": 64})
    assert train(tmp_path, gpt2(), apply_patch(spec, error.patch))[0].progress.step == 1


def test_exceeding_rotary_positions_of_a_trained_model_gives_a_warning(tmp_path: Path) -> None:
    llama(max_position_embeddings=32).save_pretrained(tmp_path / "model")  # pyright: ignore[reportCallIssue]
    spec: dict[str, Any] = {"seq_len": 64, "max_steps": 1, "learning_rate": 1e-4}
    _, lines = train(tmp_path, str(tmp_path / "model"), spec)
    beyond = warnings_by_code(lines)["beyond_positions"]
    assert beyond.patch == {"seq_len": 32}
    _, lines = train(tmp_path, str(tmp_path / "model"), apply_patch(spec, beyond.patch))
    assert not warnings_by_code(lines)


def test_a_config_with_too_few_rows_gets_the_number_that_the_data_needs(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model": {"config": {**LLAMA_CONFIG, "vocab_size": 100}}}
    error = error_of(tmp_path, ConfigModel(**config["model"]), {"max_steps": 1}, InvalidModel)
    assert error.evidence["embedding_rows"] == 100
    patched = apply_patch(config, error.patch)
    assert patched["model"]["config"]["vocab_size"] == int(error.evidence["largest_token_id"]) + 1  # pyright: ignore[reportArgumentType]
    assert train(tmp_path, ConfigModel(**patched["model"]), {"max_steps": 1})[0].progress.step == 1


def test_the_tokenizer_of_another_model_is_removed_by_the_patch(tmp_path: Path) -> None:
    llama(vocab_size=100).save_pretrained(tmp_path / "model")  # pyright: ignore[reportCallIssue]
    python_words_tokenizer().save_pretrained(tmp_path / "model")
    python_words_tokenizer(500).save_pretrained(tmp_path / "other")
    spec: dict[str, Any] = {"max_steps": 1, "learning_rate": 1e-4, "tokenizer": str(tmp_path / "other")}
    error = error_of(tmp_path, str(tmp_path / "model"), spec, InvalidModel)
    assert error.patch == {"tokenizer": None}
    assert train(tmp_path, str(tmp_path / "model"), apply_patch(spec, error.patch))[0].progress.step == 1


def python_words_tokenizer(size: int = 90) -> PreTrainedTokenizerFast:
    """A tokenizer of the most frequent words of the language reference, with an unknown token and no padding token."""
    from collections import Counter
    from pydoc_data.topics import topics

    counted = Counter(word for text in topics.values() for word in text.split())
    words = ["<unk>", *(word for word, _ in counted.most_common(size - 1) if word != "<unk>")]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_a_tokenizer_without_padding_needs_none_and_nothing_is_resized(tmp_path: Path) -> None:
    python_words_tokenizer().save_pretrained(tmp_path / "words")
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(f'{{"text": "{"the value of a " * length}"}}\n' for length in (1, 2, 3, 5)))
    spec: dict[str, Any] = {
        "tokenizer": str(tmp_path / "words"),
        "dataset": {"path": str(data)},
        "eval_dataset": {"path": str(data)},
        "pack": False,
        "epochs": 1,
        "batch_size": 4,
    }
    model = llama(vocab_size=90)
    together, lines = train(tmp_path, model, spec)
    advice = warnings_by_code(lines)["tokenizer_without_padding"]
    assert "has no padding token, and none is needed" in advice.message
    assert advice.evidence == {"pad_token": None, "pack": False, "mean_tokens": 11.0}
    assert model.get_parameter("model.embed_tokens.weight").shape[0] == 90
    alone, _ = train(tmp_path, llama(vocab_size=90), {**spec, "batch_size": 1, "gradient_accumulate_every": 4})
    assert together.progress.train_loss == pytest.approx(alone.progress.train_loss, abs=1e-6), (
        "padding is not trained on"
    )
    assert together.progress.eval_loss == pytest.approx(alone.progress.eval_loss, abs=1e-6)
    _, lines = train(tmp_path, llama(vocab_size=90), apply_patch(spec, advice.patch))
    assert "tokenizer_without_padding" not in warnings_by_code(lines)


def test_documents_that_are_not_isolated_get_advice_with_a_patch(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"max_steps": 1}
    _, lines = train(tmp_path, summing(), spec)
    assert lines.resolved_spec["pack"] is False
    apart = warnings_by_code(lines)["documents_not_packed"]
    assert "can't keep packed documents apart: its forward accepts neither attention_mask nor position_ids" in (
        apart.message
    )
    packed = {**spec, "pack": True}
    _, lines = train(tmp_path, summing(), packed)
    assert lines.resolved_spec["pack"] is True
    shared = warnings_by_code(lines)["documents_not_isolated"]
    _, lines = train(tmp_path, summing(), apply_patch(packed, shared.patch))
    assert not warnings_by_code(lines)
    _, lines = train(tmp_path, plain(), spec)
    assert lines.resolved_spec["pack"] is True
    assert not warnings_by_code(lines), "the model sees one token at a time, so documents are isolated"
    padded = {**spec, "pack": False}
    _, lines = train(tmp_path, WithReturnLoss(), padded)
    learned = warnings_by_code(lines)["padding_is_learned"]
    assert learned.patch == {"pack": True}
    _, lines = train(tmp_path, WithReturnLoss(), apply_patch(padded, learned.patch))
    assert "padding_is_learned" not in warnings_by_code(lines)
    left = warnings_by_code(lines)["documents_not_isolated"]
    assert left.patch is None, "undoing the change would bring the first warning back"
    assert "Change its forward to return logits" in (left.hint or "")


def test_a_model_that_attends_to_later_tokens_gets_advice(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"intermediate_size": 32, "vocab_size": 400, "max_position_embeddings": 64}
    spec: dict[str, Any] = {"max_steps": 1, "seq_len": 32}
    _, lines = train(tmp_path, ConfigModel(config={**config, **sizes}), spec)
    assert "sees what it should predict" in warnings_by_code(lines)["looks_ahead"].message
    _, lines = train(tmp_path, ConfigModel(config={**config, **sizes, "is_decoder": True}), spec)
    assert "looks_ahead" not in warnings_by_code(lines)


def test_an_overlong_document_is_rejected_with_a_patch_that_truncates_it(tmp_path: Path) -> None:
    spec: dict[str, Any] = {"overlong": "error", "seq_len": 64, "max_steps": 1}
    error = error_of(tmp_path, llama(), spec, InvalidData)
    assert error.patch == {"overlong": "truncate"}
    assert int(error.evidence["longest_tokens"]) > 64  # pyright: ignore[reportArgumentType]
    assert train(tmp_path, llama(), apply_patch(spec, error.patch))[0].progress.step == 1
