"""Decoding several sequences at once: their key-value caches form one batch, which sequences may join and leave.

A joining sequence is first computed alone, exactly as ``generate`` of transformers does it. Its cache is then padded on
the left to the length of the batch. A batch of one sequence has no padding, so its logits equal those of ``generate``
bit by bit; in a larger batch they may differ by rounding. A model whose cache does not consist of keys and values alone
(Mamba, linear attention) has no batch: each of its sequences is computed again from its first token at every step.

Shapes: B sequences, T tokens including padding, V entries of the vocabulary, H heads, D values per head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad


@dataclass(eq=False)
class SequenceState:
    """The token ids of one sequence: its prompt, and the tokens that were chosen since."""

    ids: list[int]
    max_length: int = 0  # the largest number of tokens that it may reach
    is_cached: bool = field(default=False, init=False)


class DecodingBatch:
    """The sequences that are being decoded."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.sequences: list[SequenceState] = []
        self.bytes_per_token = 0  # of the cache; 0 until the first sequence
        self._model: Any = model
        self._device = device
        accepted = inspect.signature(self._model.forward).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
        self._takes_positions = "position_ids" in accepted
        self._keeps_last = "logits_to_keep" in accepted
        self._may_cache = takes_any or "past_key_values" in accepted
        self._cache: Any = None  # a DynamicCache of the cached sequences, in their order
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long, device=device)  # 0 for padding

    def __len__(self) -> int:
        return len(self.sequences)

    def padded_tokens(self, *joining: int) -> int:
        """The tokens of the cache if sequences of these lengths joined, and every one reached its largest length."""
        lengths = [*joining, *(sequence.max_length for sequence in self.sequences)]
        return len(lengths) * max(lengths, default=0)

    @torch.inference_mode()
    def add(self, sequence: SequenceState) -> torch.Tensor:
        """Compute the prompt of a new sequence, and add it. Returns the logits of its next token (V)."""
        logits_V, cache = self._prefill(sequence.ids)
        if cache is not None:
            sequence.is_cached = True
            self._join(cache, len(sequence.ids))
        self.sequences.append(sequence)
        return logits_V

    @torch.inference_mode()
    def step(self) -> list[torch.Tensor]:
        """Compute the last token of every sequence, which was appended to its ``ids``. Returns the next logits (V)."""
        cached = [sequence for sequence in self.sequences if sequence.is_cached]
        logits: dict[int, torch.Tensor] = {}
        if cached:
            last_B1 = torch.tensor([[sequence.ids[-1]] for sequence in cached], device=self._device)
            new_B1 = torch.ones(len(cached), 1, dtype=torch.long, device=self._device)
            self._mask_BT = torch.cat((self._mask_BT, new_B1), dim=1)
            logits_BV = self._forward(last_B1, self._mask_BT, self._mask_BT.sum(1, keepdim=True) - 1, self._cache)
            logits = {id(sequence): row for sequence, row in zip(cached, logits_BV, strict=True)}
        return [
            logits[id(sequence)] if sequence.is_cached else self._prefill(sequence.ids)[0]
            for sequence in self.sequences
        ]

    @torch.inference_mode()
    def remove(self, leaving: Sequence[SequenceState]) -> None:
        """Remove sequences, and the padding that no other sequence needs."""
        cached = [sequence for sequence in self.sequences if sequence.is_cached]
        kept = [number for number, sequence in enumerate(cached) if sequence not in leaving]
        self.sequences = [sequence for sequence in self.sequences if sequence not in leaving]
        if len(kept) == len(cached):
            return
        if not kept:
            self._cache, self._mask_BT = None, self._mask_BT[:0, :0]
            return
        rows = torch.tensor(kept, device=self._device)
        mask_BT = self._mask_BT[rows]
        start = int(mask_BT.any(dim=0).int().argmax())
        self._mask_BT = mask_BT[:, start:].contiguous()
        for layer in self._cache.layers:
            layer.keys = layer.keys[rows][:, :, start:].contiguous()
            layer.values = layer.values[rows][:, :, start:].contiguous()

    def _prefill(self, ids: list[int]) -> tuple[torch.Tensor, Any]:
        """The logits of the next token (V) of a sequence computed alone, and its cache if it can join a batch."""
        from transformers import DynamicCache

        ids_1T = torch.tensor([ids], device=self._device)
        mask_1T = torch.ones_like(ids_1T)
        positions_1T = torch.arange(len(ids), device=self._device)[None]
        if not self._may_cache:
            return self._forward(ids_1T, mask_1T, positions_1T, None)[0], None
        cache: Any = DynamicCache()
        try:
            logits_V = self._forward(ids_1T, mask_1T, positions_1T, cache)[0]
            self._may_cache = _has_only_keys_and_values(cache, len(ids))
        except (TypeError, AttributeError, ValueError, IndexError):  # this model needs a cache of another kind
            self._may_cache = False
            logits_V = None
        if logits_V is None or not self._may_cache:
            return self._forward(ids_1T, mask_1T, positions_1T, None)[0], None
        if not self.bytes_per_token:
            tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            self.bytes_per_token = sum(part.numel() * part.element_size() for part in tensors) // len(ids)
        return logits_V, cache

    def _join(self, cache: Any, length: int) -> None:
        row_1T = torch.ones(1, length, dtype=torch.long, device=self._device)
        if self._cache is None:
            self._cache, self._mask_BT = cache, row_1T
            return
        others = self._mask_BT.shape[1]
        longest = max(others, length)
        self._mask_BT = torch.cat((pad(self._mask_BT, (longest - others, 0)), pad(row_1T, (longest - length, 0))))
        for layer, new in zip(self._cache.layers, cache.layers, strict=True):
            layer.keys = _joined(layer.keys, new.keys, longest)
            layer.values = _joined(layer.values, new.values, longest)

    def _forward(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, positions_BT: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """The logits of the next tokens, (B, V)."""
        options: dict[str, Any] = {"attention_mask": mask_BT, "use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache
        if self._takes_positions:
            options["position_ids"] = positions_BT
        if self._keeps_last:
            options["logits_to_keep"] = 1
        return self._model(input_ids=ids_BT, **options).logits[:, -1]


def _joined(batch_BHTD: torch.Tensor, new_1HTD: torch.Tensor, length: int) -> torch.Tensor:
    padded = [pad(part, (0, 0, length - part.shape[2], 0)) for part in (batch_BHTD, new_1HTD)]
    return torch.cat(padded)


def _has_only_keys_and_values(cache: Any, length: int) -> bool:
    from transformers.cache_utils import DynamicLayer

    layers: list[Any] = list(cache.layers)
    return bool(layers) and all(
        type(layer) is DynamicLayer
        and layer.keys is not None
        and layer.keys.ndim == 4
        and layer.keys.shape[2] == length
        for layer in layers
    )
