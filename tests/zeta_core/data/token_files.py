"""Token files in memory with given or random documents."""

from __future__ import annotations

import numpy as np

from zeta_core.data.tokens import TokenFile


def token_file(*documents: list[int]) -> TokenFile:
    ids = np.array([token for document in documents for token in document], dtype=np.uint16)
    offsets = np.cumsum([0, *(len(document) for document in documents)], dtype=np.int64)
    return TokenFile(ids, offsets, int(ids.max()), "test")


def random_documents(lengths: list[int], *, seed: int = 0, vocab_size: int = 300) -> TokenFile:
    generator = np.random.default_rng(seed)
    return token_file(*([int(i) for i in generator.integers(3, vocab_size, size=length)] for length in lengths))
