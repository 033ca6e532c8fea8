"""Packed sequences lose no token and need no padding, and their documents are isolated in real model families."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.zeta_core.data.token_files import random_documents, token_file
from tests.zeta_core.models import VOCABULARY, llama
from tests.zeta_core.objective.packed_loss import packed_loss_function
from zeta_core.data.sequences import IGNORED, Sequences
from zeta_core.objective.loss import find_logits


def test_packing_uses_every_token_and_pads_only_the_last_sequence() -> None:
    tokens = random_documents([5, 1, 13, 40, 3])
    sequences = Sequences(tokens, 16, pack=True)
    indices = np.arange(len(sequences))
    assert sequences.num_tokens(indices) == tokens.num_tokens
    batch = sequences.batch(indices, len(indices))
    assert batch.ids_BT.flatten()[: tokens.num_tokens].tolist() == tokens.ids.tolist()
    assert sequences.batch(indices[-1:], 1).ids_BT.shape == (1, 62 % 16), "a batch of one needs no padding"


def test_the_first_token_of_a_document_is_not_a_target_and_positions_restart() -> None:
    batch = Sequences(token_file([5, 6, 7], [8, 9], [10, 11, 12]), 8, pack=True).batch(np.array([0]), 1)
    assert batch.labels_BT.tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, 11, 12]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.segments_BT is not None
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2, 2, 3, 3, 3]]


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("lengths", [[7, 3, 64, 1, 2, 33], [2] * 40, [100], [16, 16, 17]])
def test_target_counts_and_widths_match_the_batches(lengths: list[int], pack: bool) -> None:
    sequences = Sequences(random_documents(lengths), 16, pack=pack)
    for index in range(len(sequences)):
        one = np.array([index])
        assert sequences.num_targets(one) == sequences.batch(one, 1).num_targets
    indices = np.arange(len(sequences))
    batch = sequences.batch(indices, len(indices))
    assert sequences.num_targets(indices) == batch.num_targets
    assert batch.ids_BT.shape[1] == sequences.widths(indices).max()


def test_without_packing_each_document_has_its_own_sequences() -> None:
    sequences = Sequences(random_documents([20, 3, 1]), 8, pack=False)
    assert [int(end - start) for start, end in zip(*sequences.spans(np.arange(len(sequences))), strict=True)] == [
        8,
        8,
        4,
        3,
    ]
    assert sequences.batch(np.array([2, 3]), 2).ids_BT.shape == (2, 4), "padded to the longest row, not to seq_len"


def test_rows_that_do_not_count_have_no_targets() -> None:
    batch = Sequences(random_documents([64]), 16, pack=True).batch(np.array([0, 1]), 1)
    assert batch.num_targets == 15
    assert (batch.labels_BT[1] == IGNORED).all()


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64))


def _qwen3(**changes: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**values, **changes}))


def _mistral_with_a_window() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        sliding_window=8,
    )
    return MistralForCausalLM(config)


@pytest.mark.parametrize("build", [llama, _gpt2, _qwen3, _mistral_with_a_window], ids=lambda build: build.__name__)
def test_a_packed_document_gets_the_same_logits_as_alone(build: Any) -> None:
    torch.manual_seed(0)
    model = build()
    first, second = [11, 23, 35, 47, 59], [201, 17, 99, 143, 7, 64, 128, 250, 31, 77, 5]
    sequences = Sequences(token_file(first, second), 16, pack=True)
    loss_function = packed_loss_function(model, [*first, *second])
    assert loss_function.isolates
    model.eval()
    with torch.no_grad():
        packed = find_logits(loss_function.call(model, sequences.batch(np.array([0]), 1)))
        alone = find_logits(model(torch.tensor([second]), use_cache=False))
    assert packed is not None
    assert alone is not None
    torch.testing.assert_close(packed[0, len(first) :], alone[0], atol=2e-6, rtol=1e-5)


def test_a_sequence_of_65536_tokens_is_built_in_milliseconds_without_a_mask() -> None:
    sequences = Sequences(random_documents([500] * 200), 65_536, pack=True)
    sequences.batch(np.arange(1), 1)  # the first call reads the file
    seconds = min(_processor_seconds(sequences) for _ in range(5))
    tracemalloc.start()
    batch = sequences.batch(np.arange(1), 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.ids_BT.shape == (1, 65_536)
    assert seconds < 0.05
    assert peak < 100e6


def _processor_seconds(sequences: Sequences) -> float:
    began = time.process_time()
    sequences.batch(np.arange(1), 1)
    return time.process_time() - began
