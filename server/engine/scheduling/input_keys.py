"""Short keys of a job's model and data, which workers report for the inputs that their caches hold.

The keys contain the project, because workers keep a cache of tokens for each project.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

KEY_DIGITS = 12
MAX_INPUTS = 16  # of one job
_NOT_CACHED = frozenset({"builtin", "builder", "config"})  # keys of sources that are on every worker


def input_keys(project: str, model: Any, dataset: Any) -> frozenset[str]:
    """The keys of a model and of the sources of a dataset, as they are in a spec."""
    sources: list[Any] = dataset if isinstance(dataset, list) else [dataset]
    found = [source for source in (model, *sources) if source is not None and not _is_everywhere(source)]
    return frozenset(_key(project, source) for source in found[:MAX_INPUTS])


def _is_everywhere(source: Any) -> bool:
    return isinstance(source, dict) and not _NOT_CACHED.isdisjoint(source)


def _key(project: str, source: Any) -> str:
    text = json.dumps([project, source], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]
