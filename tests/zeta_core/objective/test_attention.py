"""Attention within documents: the same results as with masks, without a tensor of tokens by tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.zeta_core.data.token_files import random_documents
from tests.zeta_core.models import llama, plain
from tests.zeta_core.objective.small_families import ISOLATED, NOT_ISOLATED, WINDOW, build
from zeta import Trainer
from zeta_core.contract.errors import InvalidSpec
from zeta_core.data.sequences import MicroBatch, Sequences
from zeta_core.failures import CannotTrain
from zeta_core.memory.activations import LiveTensors
from zeta_core.objective.attention import attention_implementation, current_attention
from zeta_core.objective.document_kernel import Documents, attend_by_kernel, attend_by_mask, fits_kernel, kernel_problem
from zeta_core.objective.isolation import Isolation
from zeta_core.objective.isolation_probe import supports_documents
from zeta_core.objective.loss_probe import find_loss_function

SAMPLE = [5, 6, 7, 8, 9, 10, 11, 12]
# The others have soft caps, sinks or position biases in their attention, attend in chunks, or carry a state.
SUPPORTED = [
    *("cohere", "cohere2", "gemma", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "granite", "granitemoe", "llama"),
    *("mistral", "mixtral", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("smollm3", "stablelm", "starcoder2"),
]
SETTINGS: dict[str, Any] = {"seq_len": 32, "batch_size": 2, "max_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))


def packed(*lengths: int, seq_len: int = 64, rows: int = 2) -> MicroBatch:
    return Sequences(random_documents(list(lengths)), seq_len, pack=True).batch(np.arange(rows), rows)


def plan_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "final" / "training_state" / "state.json").read_text())["plan"]


@pytest.mark.parametrize("family", [*ISOLATED, *NOT_ISOLATED])
def test_families_are_supported_if_their_attention_is_causal_and_plain(family: str) -> None:
    assert supports_documents(build(family), sample_ids=SAMPLE) == (family in SUPPORTED)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "qwen3_moe", "cohere2"])
def test_losses_and_gradients_are_those_of_masked_attention(family: str) -> None:
    """The documents are shorter and longer than the attention windows."""
    batch = packed(3, 5 * WINDOW, 20, 9, 30, 26, seq_len=64)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name in ("sdpa", "varlen"):
        model = build(family)
        with attention_implementation(model, name):
            loss_function = replace(find_loss_function(model, sample_ids=SAMPLE), isolation=Isolation(positions=True))
            loss, _ = loss_function(model, batch)
            (loss / batch.num_targets).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)


def attend_by_offsets(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any, **options: Any) -> Any:
    """What torch documents for `varlen_attn`, which runs on GPUs only: each document by itself, with a window."""
    offsets, parts = given[0].tolist(), list[torch.Tensor]()
    for start, end in pairwise(offsets):
        at = torch.arange(end - start)
        back = at[:, None] - at
        window, _ = options["window_size"]
        allowed = (back >= 0) & ((back <= window) if window >= 0 else True)
        of_query, of_key, of_value = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        enable_gqa = options["enable_gqa"]
        parts.append(F.scaled_dot_product_attention(of_query, of_key, of_value, allowed, enable_gqa=enable_gqa)[0])
    assert given[2] == max(end - start for start, end in pairwise(offsets))
    return torch.cat(parts, dim=1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 5])
def test_rows_of_documents_are_passed_to_the_kernel_one_after_the_other(window: int | None) -> None:
    torch.manual_seed(0)
    documents = Documents([[(0, 20), (20, 32)], [(0, 3), (3, 32)]], 32, torch.device("cpu"))
    query, key, value = (torch.randn(2, heads, 32, 8) for heads in (4, 2, 2))
    found = attend_by_kernel(query, key, value, documents, window=window, kernel=attend_by_offsets)
    torch.testing.assert_close(found, attend_by_mask(query, key, value, documents, window=window), rtol=0, atol=1e-6)


def test_the_kernel_is_not_used_without_a_gpu_or_in_float32() -> None:
    query = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16)
    assert not fits_kernel(query, query, dropout=0.0)
    assert kernel_problem(torch.device("cpu"), torch.bfloat16) is not None
    assert kernel_problem(torch.device("cuda"), torch.float32) is not None


class LargestTensor(TorchDispatchMode):
    num_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_values = max(self.num_values, *sizes, 0)
        return result


def test_no_tensor_of_tokens_by_tokens_exists() -> None:
    length, model = 2048, llama(max_position_embeddings=2048)
    batch = packed(*[200] * 30, seq_len=length, rows=1)
    largest: dict[str, int] = {}
    for name in ("sdpa", "varlen"):
        with attention_implementation(model, name):
            loss_function = replace(find_loss_function(model, sample_ids=SAMPLE), isolation=Isolation(positions=True))
            with LargestTensor() as tensors:
                loss_function(model, batch)[0].backward()
        largest[name] = tensors.num_values
    assert largest["sdpa"] >= length * length > largest["varlen"]


def test_a_batch_of_32768_tokens_needs_less_memory_than_a_mask_of_them() -> None:
    length = 32_768
    model = llama(max_position_embeddings=length)
    loss_function = replace(find_loss_function(model, sample_ids=SAMPLE), isolation=Isolation(positions=True))
    batch = packed(*[500] * 80, seq_len=length, rows=1)
    with attention_implementation(model, "varlen"), LiveTensors(model) as live:
        loss_function(model, batch)[0].backward()
    assert batch.ids_BT.shape == (1, length)
    assert live.peak_bytes < length * length / 2


def test_a_run_on_a_cpu_uses_it_records_it_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = llama()
    before = current_attention(model)
    Trainer(model=model, output_dir=tmp_path / "out", **SETTINGS)
    assert plan_of(tmp_path / "out")["attn_implementation"] == "varlen"
    assert current_attention(model) == before == "sdpa"
    assert "zeta" not in (tmp_path / "out" / "final" / "config.json").read_text()
    changed: dict[str, Any] = {**SETTINGS, "max_steps": 3, "resume_from_checkpoint": tmp_path / "out"}
    Trainer(model=llama(), output_dir=tmp_path / "out", **changed)
    assert plan_of(tmp_path / "out")["attn_implementation"] == "varlen"
    with pytest.raises(Exception, match=r"attn_implementation is 'sdpa', but the run was started with 'varlen'"):
        Trainer(model=llama(), output_dir=tmp_path / "out", **changed, attn_implementation="sdpa")


@pytest.mark.extended
def test_the_requested_implementation_is_used_and_recorded(tmp_path: Path) -> None:
    losses: list[float] = []
    for name in ("eager", "sdpa", "varlen"):
        result = Trainer(model=llama(), output_dir=tmp_path / name, **SETTINGS, attn_implementation=name)
        assert plan_of(tmp_path / name)["attn_implementation"] == name
        losses.append(result.train_loss or 0.0)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (plain, "sdpa", "PlainModel is not a model of transformers"),
        (plain, "varlen", "which PlainModel does not support"),
        (llama, "flex", "it needs a GPU"),
        (lambda: build("gemma2"), "varlen", "which Gemma2ForCausalLM does not support"),
    ],
)
def test_an_implementation_that_cannot_take_effect_is_rejected(
    model: Any, name: str, reason: str, tmp_path: Path
) -> None:
    if torch.cuda.is_available() and name == "flex":
        pytest.skip("this machine has a GPU")
    built: nn.Module = model()
    with pytest.raises(CannotTrain, match=reason):
        Trainer(model=built, output_dir=tmp_path / "out", **SETTINGS, attn_implementation=name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_implementation": "flash_attention_2"}, "add pack=false"),
        ({"attn_implementation": "varlen", "compile": True}, "documents of any length can't be compiled"),
        ({"attn_implementation": "flash"}, "it must be 'auto', 'sdpa'"),
    ],
)
def test_contradictions_are_rejected(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=reason):
        Trainer(model=llama(), output_dir=tmp_path / "out", **SETTINGS, **changes)
