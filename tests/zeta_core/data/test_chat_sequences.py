"""Conversations in sequences: they are never split to fill one, and those that are too long are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.data.conversations import GOOD_ROW, tokens_of
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.data_report import nothing_to_train_error
from zeta_core.data.sequences import IGNORED, Sequences, packing
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import prepare_tokens
from zeta_core.failures import InvalidData
from zeta_core.report.reporter import Reporter


def chats(lengths: list[int]) -> list[dict[str, Any]]:
    """Conversations of ``22 + length`` tokens in ChatML: 20 before the answer, ``length`` letters, two after."""
    return [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a" * n}]} for n in lengths
    ]


@pytest.mark.parametrize("pack", [True, False])
def test_labels_survive_packing_and_padding(pack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PIECE_TOKENS", 40)  # as if the data were large
    tokenizer = byte_tokenizer(chat_templates.CHATML)
    tokens = tokens_of(tmp_path, chats([5, 9, 1, 30, 12]), tokenizer)
    sequences = Sequences(tokens, 64, pack=pack)
    indices = np.arange(len(sequences))
    batch = sequences.batch(indices, len(indices))
    answers = sorted(tokenizer.decode(row[row != IGNORED]) for row in batch.labels_BT.numpy() if (row != IGNORED).any())
    assert "".join(answers).count("a") == 5 + 9 + 1 + 30 + 12
    assert sequences.num_targets(indices) == batch.num_targets == (5 + 9 + 1 + 30 + 12) + 5 * 2
    assert [sequences.num_targets(np.array([i])) for i in indices] == [
        sequences.batch(np.array([i]), 1).num_targets for i in indices
    ]
    assert sequences.num_tokens(indices) == tokens.num_tokens
    assert len(sequences) == (5 if not pack else 3)
    for row in range(len(indices)):  # a label is the token itself, and positions stay within the conversation
        learned = batch.labels_BT[row] != IGNORED
        assert (batch.labels_BT[row][learned] == batch.ids_BT[row][learned]).all()
        assert (batch.positions_BT[row][learned] >= 20).all()


def test_conversations_are_never_cut_to_fill_a_sequence(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, chats(list(range(1, 41))), byte_tokenizer(chat_templates.CHATML))
    sequences = Sequences(tokens, 100, pack=True)
    filled = [sequences.num_tokens(np.array([index])) for index in range(len(sequences))]
    assert sum(filled) == tokens.num_tokens
    assert max(filled) <= 100
    assert len(sequences) <= -(-tokens.num_tokens // 100) + 4, "little padding is needed"


@pytest.mark.parametrize(
    ("overlong", "kept", "counts"),
    [
        (None, [28, 40], (1, 1)),
        ("truncate", [28, 40], (1, 1)),
        ("drop", [28], (0, 2)),
    ],
)
def test_a_conversation_longer_than_a_sequence_is_cut_or_dropped_and_counted(
    overlong: Any, kept: list[int], counts: tuple[int, int], tmp_path: Path
) -> None:
    rows = chats([6, 30])
    rows.append({"messages": [{"role": "user", "content": "?" * 50}, {"role": "assistant", "content": "a"}]})
    num_cut_tokens = {None: 12, "truncate": 12, "drop": 0}[overlong]
    tokens = tokens_of(tmp_path, rows, byte_tokenizer(chat_templates.CHATML))
    sequences = Sequences(tokens, 40, pack=True, overlong=overlong)
    found = sequences.overlong_counts
    assert sorted(sequences.num_tokens(np.array([i])) for i in range(len(sequences))) == kept
    assert (found.num_truncated, found.num_dropped) == counts
    assert found.num_cut_tokens == num_cut_tokens, "tokens of dropped conversations do not count as cut"
    if overlong == "drop":
        assert found.dropped_at == "chat.jsonl, line 2"
    else:  # the answer of the third one lies beyond the cut, so nothing is left to train on
        assert (found.truncated_at, found.dropped_at) == ("chat.jsonl, line 2", "chat.jsonl, line 3")


def test_overlong_error_rejects_a_conversation_longer_than_a_sequence(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, chats([6, 30]), byte_tokenizer(chat_templates.CHATML))
    with pytest.raises(
        InvalidData, match=r"^chat\.jsonl, line 2 has 52 tokens, more than the 40 of seq_len, as 1 of 2"
    ):
        Sequences(tokens, 40, pack=True, overlong="error")


def test_if_no_answer_fits_the_error_states_the_length_of_the_documents(tmp_path: Path) -> None:
    tokens = tokens_of(tmp_path, chats([6, 30]), byte_tokenizer(chat_templates.CHATML))
    error = nothing_to_train_error(tokens, Sequences(tokens, 20, pack=True))
    assert error.message == (
        "None of the 2 documents can be trained on: 2 are longer than the 20 tokens of seq_len, or their answer lies "
        "beyond it; the first is chat.jsonl, line 1."
    )
    assert error.hint == "Raise seq_len; the longest document has 52 tokens."


def test_text_shares_sequences_with_conversations_and_continues_in_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 150)
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD_ROW) + "\n")
    options = parse(TrainerOptions, {"dataset": [{"path": str(tmp_path / name)} for name in ("a.txt", "b.jsonl")]})
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    tokens = prepare_tokens(sources, byte_tokenizer(chat_templates.CHATML), tmp_path / "cache", Reporter())
    sequences = Sequences(tokens, 100, pack=True)
    assert sequences.overlong_counts.num_truncated == 0
    indices = np.arange(len(sequences))
    assert sequences.num_tokens(indices) == tokens.num_tokens
    # The text except for the first token of its two parts, and the two answers.
    assert sequences.num_targets(indices) == (151 - 2) + (4 + 2 + 8 + 2) == sequences.batch(indices, 9).num_targets
