"""Choosing the end, begin and padding tokens in the configurations of a checkpoint.

``generate()`` stops at ``generation_config.eos_token_id``, so it must contain the token that the training data teaches
as the end. A config that was written for another tokenizer, or left at the defaults of its class, does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from zeta_core.data.tokens.end_tokens import Markers


@dataclass(frozen=True)
class SpecialTokens:
    """The tokenizer of the data, and the end tokens that the data teaches."""

    tokenizer: Any
    taught: tuple[int, ...]
    from_scratch: bool
    num_embeddings: int | None

    @property
    def ends(self) -> frozenset[int]:
        """The taught end tokens and the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        return frozenset(self.taught) | ({own} if own is not None else frozenset())

    def apply(self, config: Any, generation: Any) -> str | None:
        """Set the tokens, in place. Returns a message if an end token that the model or its config chose changed.

        The config of a pretrained model keeps its own tokens, because only ``generate()`` depends on them.
        """
        before = self._chosen(config, _as_list(generation.eos_token_id))
        ends = self._ends(before)
        if self.from_scratch:
            for name, value in (("bos_token_id", self._own("bos")), ("pad_token_id", self._own("pad"))):
                setattr(generation, name, value)
            for part in {id(part): part for part in (config, config.get_text_config())}.values():
                self._apply_to_config(part, ends)
        generation.eos_token_id = _as_value(ends)
        if ends == before or (self.from_scratch and not before):
            return None
        reason = "the training data teaches it" if self.taught else "it is the tokenizer's"
        return (
            f"The saved generation_config ends generation at {self._words(ends)}, instead of "
            f"{self._words(before)}, because {reason}."
        )

    def _chosen(self, config: Any, tokens: list[int]) -> list[int]:
        """The tokens without the default of a new model's config class, which belongs to no tokenizer."""
        default = _as_list(getattr(type(config.get_text_config()), "eos_token_id", None)) if self.from_scratch else []
        return [token for token in tokens if token not in default]

    def _ends(self, before: list[int]) -> list[int]:
        """The taught tokens, the tokenizer's own, and those of the config that the tokenizer knows as special."""
        own = self._own("eos")
        if not self.from_scratch and not self.taught:
            return before
        markers = Markers.of(self.tokenizer)
        known = [token for token in before if token in markers.special or token in markers.added]
        return list(dict.fromkeys([*self.taught, *([] if own is None else [own]), *known]))

    def _apply_to_config(self, config: Any, ends: list[int]) -> None:
        padding = self._own("pad")
        if padding in ends or padding == self._own("bos"):
            padding = None  # the embedding of a config's padding token gets no gradient in a later training
        tokens = (("eos_token_id", _as_value(ends)), ("bos_token_id", self._own("bos")), ("pad_token_id", padding))
        for name, value in tokens:
            if hasattr(config, name):
                setattr(config, name, value)

    def _own(self, kind: str) -> int | None:
        """The tokenizer's token, if the model has an embedding for it."""
        token = cast("int | None", getattr(self.tokenizer, f"{kind}_token_id"))
        return None if token is None or token >= (self.num_embeddings or token + 1) else token

    def _words(self, ids: list[int]) -> str:
        named = [f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in ids]
        return " or ".join(named) or "no token"


def _as_list(tokens: int | list[int] | None) -> list[int]:
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, list | tuple) else [tokens]


def _as_value(tokens: list[int]) -> int | list[int] | None:
    if len(tokens) > 1:
        return tokens
    return tokens[0] if tokens else None
