"""The text of tokens that arrive one by one, cut off before stop strings.

A character may consist of several tokens, and in some tokenizers a token's text depends on the token before it. So the
text is decoded in windows: of the tokens since a point whose text is known, and of the same without the new ones; the
difference is new text. The method is that of Hugging Face's text-generation-inference (``decode_token`` in
``server/text_generation_server/models/model.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from zeta_core.contract.wire.answers import TokenLogprob, TopLogprob
from zeta_core.serve.sampling import Chosen

_REPLACEMENT = "\ufffd"  # an incomplete character


class TextDecoder:
    """Decodes the tokens of one choice. Tokens that the tokenizer doesn't know have no text.

    A model may have more logits than its tokenizer has tokens.
    """

    def __init__(self, tokenizer: Any, *, keeps_special: bool) -> None:
        self._tokenizer = tokenizer
        self._num_known = len(tokenizer)
        self._skips = not keeps_special
        self._ids: list[int] = []
        self._known = 0  # the window starts here; its text up to `_read` was returned
        self._read = 0

    def add(self, token: int) -> str:
        """The new text; empty while a character is incomplete."""
        if token >= self._num_known:
            return ""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._known, self._read = self._read, len(self._ids)
        return text

    def finish(self) -> str:
        """The text of an incomplete character at the end."""
        text = self._new_text()
        self._known = self._read = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decoded(self._ids[self._known : self._read])
        return self._decoded(self._ids[self._known :])[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False)


class StopFilter:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.has_stopped = False

    def add(self, text: str, *, is_last: bool = False) -> str:
        """The text that is known to precede every stop string."""
        if self.has_stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.has_stopped, self._held = True, ""
            return text[: min(found)]
        num_held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TokenBytes:
    """The bytes of single tokens, also of those that are only a part of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._num_known = len(tokenizer)

    def logprob(self, chosen: Chosen) -> TokenLogprob:
        assert chosen.logprob is not None, "log-probabilities were not requested"
        top = [TopLogprob(**self._text(token), logprob=logprob) for token, logprob in chosen.top]
        return TokenLogprob(**self._text(chosen.token), logprob=chosen.logprob, top=top)

    def _text(self, token: int) -> dict[str, Any]:
        if token >= self._num_known:
            return {"token": "", "bytes": []}
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if _REPLACEMENT not in text:
            return {"token": text, "bytes": list(text.encode())}
        raw = self._raw_bytes(token)
        if raw is None:
            return {"token": text, "bytes": list(text.encode())}
        return {"token": "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), "bytes": raw}

    def _raw_bytes(self, token: int) -> list[int] | None:
        """The bytes of a token that is not a complete text, in the two usual notations."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):  # SentencePiece
            return [int(name[3:5], 16)]
        table = self._byte_of_character
        return [table[character] for character in name] if all(character in table for character in name) else None

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """The alphabet of byte-level BPE: printable bytes stand for themselves, the others for U+0100 and following.

        Source: ``bytes_to_unicode`` in OpenAI's GPT-2 (encoder.py).
        """
        printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
