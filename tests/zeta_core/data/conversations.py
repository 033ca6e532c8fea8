"""Short conversations, and how they are tokenized: the text of each document, and which parts are trained on."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.report.reporter import Reporter

TODAY = date(2026, 3, 5)
TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hey!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
CALLING: list[Any] = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
]
WITH_SYSTEM = [{"role": "system", "content": "Be short."}, *TWO_TURNS]
GOOD_ROW = {"messages": TWO_TURNS}


def tokens_of(
    tmp_path: Path, rows: list[Any], tokenizer: Any, *, report: Reporter | None = None, **source: Any
) -> TokenFile:
    """Write the rows to ``chat.jsonl`` and tokenize them. ``source`` are fields of the dataset, or ``train_on``."""
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_on = source.pop("train_on", None)
    options = parse(TrainerOptions, {"dataset": {"path": str(path), **source}})
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    return prepare_tokens(sources, tokenizer, tmp_path / "cache", report or Reporter(), train_on=train_on, today=TODAY)


def documents(tokens: TokenFile, tokenizer: Any) -> list[tuple[str, list[str]]]:
    """The text of each document, and the parts of it that are trained on."""
    documents: list[tuple[str, list[str]]] = []
    for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        ids = np.asarray(tokens.ids[start:end])
        learned = np.ones(len(ids), bool) if tokens.supervised is None else np.asarray(tokens.supervised[start:end])
        edges = np.flatnonzero(np.diff(np.concatenate(([False], learned, [False])).astype(int)))
        parts = [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        documents.append((tokenizer.decode(ids), parts))
    return documents
