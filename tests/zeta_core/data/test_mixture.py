"""Weighted sources: each contributes its share, in an order that depends only on seed and position."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.zeta_core.models import plain
from tests.zeta_core.runs import train
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sequences import Mixture, Sequences, micro_batches
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import Mix, Origin, TokenFile
from zeta_core.data.tokens.held_out import hold_out
from zeta_core.failures import CannotResume, InvalidData

BOUNDS = np.array([0, 30, 130, 137])
SHARES = (0.5, 0.3, 0.2)


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """Token files whose ids identify the source of each document."""
    found: list[dict[str, Any]] = []
    for name, first, count in (("a", 10, 40), ("b", 100, 25)):
        path = tmp_path / f"{name}.jsonl"
        rows = ({"input_ids": [first + (row * 7 + at) % 40 for at in range(5 + row % 30)]} for row in range(count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append({"path": str(path), "format": "tokens"})
    return found


def two_sources(row_format: str = "text", documents: tuple[int, int] = (20, 10)) -> TokenFile:
    """Documents of 3 to 9 tokens, those of the first source below 100."""
    lengths = [3 + number % 7 for number in range(sum(documents))]
    ids = np.concatenate([np.full(n, 5 if d < documents[0] else 105) for d, n in enumerate(lengths)]).astype(np.uint16)
    origins = tuple(Origin(name, "line", row_format, count) for name, count in zip("ab", documents, strict=True))
    tokens = TokenFile(ids, np.cumsum([0, *lengths], dtype=np.int64), 105, "test", origins=origins)
    return tokens.mixed(Mix((0.5, 0.5), (0, 1)))


# --- The order --------------------------------------------------------------------------------------------------------


def test_an_epoch_has_the_shares_and_uses_each_source_fully_before_repeating_it() -> None:
    mixture = Mixture(BOUNDS, SHARES, seed=3)
    order = mixture.sequences(0, 5 * 137)
    owners = np.searchsorted(BOUNDS[1:], order, "right")
    for epoch in range(5):
        counts = np.bincount(owners[epoch * 137 : (epoch + 1) * 137], minlength=3)
        assert counts.sum() == 137
        assert (np.abs(counts - np.array(SHARES) * 137) < 1).all()
    for source, (first, last) in enumerate(pairwise(BOUNDS)):
        own = order[owners == source]
        whole = [own[at : at + last - first] for at in range(0, len(own) - (last - first) + 1, last - first)]
        assert len(whole) >= 2
        assert all(sorted(sequences) == list(range(first, last)) for sequences in whole)
        assert whole[0].tolist() != whole[1].tolist()
    seen = np.cumsum(owners[:137, None] == np.arange(3), axis=0)
    expected = np.arange(1, 138)[:, None] * np.array(SHARES)
    assert np.abs(seen - expected).max() < 3, "the sources are spread over the epoch, not one after the other"
    for length in (1, 137, 300, 5 * 137):
        assert mixture.seen(length) == np.bincount(owners[:length], minlength=3).tolist()


def test_the_order_of_a_mixture_depends_only_on_seed_and_position() -> None:
    whole = Mixture(BOUNDS, SHARES, seed=3).sequences(0, 600)
    for first in (1, 137, 200, 450):
        assert Mixture(BOUNDS, SHARES, seed=3).sequences(first, 600).tolist() == whole[first:].tolist()
    assert Mixture(BOUNDS, SHARES, seed=4).sequences(0, 600).tolist() != whole.tolist()
    for world_size in (1, 2):  # each process computes the whole order and takes its share
        steps: list[list[int]] = []
        for start in range(40, 600, 8):
            mixtures = [Mixture(BOUNDS, SHARES, seed=3) for _ in range(world_size)]
            ranks = [
                list(micro_batches(one.sequences(start, start + 8), micro_batch=2, world_size=world_size, rank=rank))
                for rank, one in enumerate(mixtures)
            ]
            steps.append(sorted(int(row) for rank in ranks for rows, counting in rank for row in rows[:counting]))
        assert steps == [sorted(whole[start : start + 8].tolist()) for start in range(40, 600, 8)]


def test_a_source_without_sequences_or_with_too_small_a_share_is_rejected() -> None:
    with pytest.raises(InvalidData, match=r"dataset\.1 has a weight, but no sequence"):
        Mixture(np.array([0, 5, 5]), (0.5, 0.5), seed=1)
    with pytest.raises(InvalidData, match=r"dataset\.0\.weight is a share of 0\.001, less than one of the 9 sequences"):
        Mixture(np.array([0, 5, 9]), (0.001, 0.999), seed=1)


# --- The sequences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_format", ["text", "messages"])
@pytest.mark.parametrize("pack", [True, False])
def test_a_sequence_comes_from_one_source(row_format: str, pack: bool) -> None:
    tokens = two_sources(row_format)
    sequences = Sequences(tokens, 16, pack=pack)
    first, bound, last = sequences.source_bounds.tolist()
    assert (first, last) == (0, len(sequences))
    for index in range(len(sequences)):
        batch = sequences.batch(np.array([index]), 1)
        learned = set(batch.labels_BT[batch.labels_BT >= 0].tolist())
        assert learned == ({5} if index < bound else {105})
    assert sequences.num_targets(np.arange(last)) == sequences.batch(np.arange(last), last).num_targets
    assert sequences.num_tokens(np.arange(last)) == tokens.num_tokens


def test_each_source_contributes_its_share_of_held_out_data() -> None:
    tokens = replace(two_sources(documents=(20, 10)), hashes=np.arange(30).astype(np.uint64))  # no copies
    split = hold_out(tokens, 0.2, seed=1)
    assert [origin.num_documents for origin in split.held_out.origins] == [4, 2]
    assert [origin.num_documents for origin in split.train.origins] == [16, 8]
    assert split.train.source_bounds.tolist() == [0, 16, 24]


def test_weights_apply_to_sources_and_not_to_their_files(sources: list[dict[str, Any]]) -> None:
    folder = str(Path(sources[0]["path"]).with_name("*.jsonl"))
    dataset = [{**sources[0], "path": folder, "weight": 3}, {"builtin": "python-docs", "weight": 1e-308}]
    options = parse(TrainerOptions, {"dataset": [{**dataset[0]}, {**sources[1], "weight": 1}]})
    mix = Mix.of(open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False))
    assert mix == Mix((0.75, 0.25), (0, 0, 1))
    alone = parse(TrainerOptions, {"dataset": dataset[0]})
    assert (
        Mix.of(open_sources(dataset_sources(alone.dataset), SourceLocations(any_path=True), pretokenized=False)) is None
    )


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_a_weighted_run_stopped_within_an_epoch_resumes_bit_exactly(
    sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    dataset = [{**sources[0], "weight": 1}, {**sources[1], "weight": 3}]
    options: dict[str, Any] = {"dataset": dataset, "seed": 3, "epochs": 2, "eval_split": 0.1, "overlong": "truncate"}
    straight, lines = train(lambda: plain(dropout=0.1), tmp_path / "straight", cache=tmp_path, **options)
    report = lines.resolved_spec["data_report"]
    total, shares = 2 * report["sequences"], report["sources"]
    assert [(source["name"], source["share"]) for source in shares] == [("a.jsonl", 0.25), ("b.jsonl", 0.75)]
    assert sum(source["seen"] for source in shares) == total == straight.progress.consumed_sequences
    for source in shares:
        assert abs(source["seen"] - source["share"] * total) < 2, "within one in each of two epochs"
        assert source["passes"] == pytest.approx(source["seen"] / source["sequences"], abs=1e-3)
    assert lines.resolved_spec["dataset"][1]["weight"] == 3

    steps = 0

    def stop() -> StopAction | None:
        nonlocal steps
        steps += 1
        return "pause" if steps == 3 else None

    first, _ = train(lambda: plain(dropout=0.1), tmp_path / "parts", cache=tmp_path, stop=stop, **options)
    assert first.stopped == "pause"
    assert 0 < first.progress.consumed_sequences % report["sequences"] < report["sequences"], "within an epoch"
    other: dict[str, Any] = {**options, "dataset": [dataset[0], {**dataset[1], "weight": 2}]}
    with pytest.raises(CannotResume, match="The data differs from the data that the run was started with"):
        train(plain, tmp_path / "parts", cache=tmp_path, resume=True, **other)
    doubled = [{**source, "weight": 2 * source["weight"]} for source in dataset]
    same_shares: dict[str, Any] = {**options, "dataset": doubled}
    second, _ = train(lambda: plain(dropout=0.1), tmp_path / "parts", cache=tmp_path, resume=True, **same_shares)
    assert second.progress.loss_sum == straight.progress.loss_sum
    final = [tmp_path / folder / "final" / "model.safetensors" for folder in ("straight", "parts")]
    assert final[0].read_bytes() == final[1].read_bytes()
