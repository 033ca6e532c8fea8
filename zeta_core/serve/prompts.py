"""Encoding the prompt of a request: rendering a conversation with the chat template, or encoding a text."""

from __future__ import annotations

from typing import Any, cast

from zeta_core.contract.wire.answers import Prompt


class InvalidPrompt(Exception):
    """The prompt can't be encoded for this model. ``param`` is the faulty parameter of the request."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.message, self.param = message, param


def encode_prompts(tokenizer: Any, prompt: Prompt) -> list[list[int]]:
    """The token ids of a conversation, or of each text. Raises `InvalidPrompt`."""
    if prompt.messages is not None:
        return [_encode_conversation(tokenizer, prompt)]
    texts = prompt.texts
    ids = [_encode_text(tokenizer, text) if isinstance(text, str) else _checked(tokenizer, text) for text in texts]
    if not all(ids):
        raise InvalidPrompt("prompt is empty, and this model needs at least one token; send some text.", "prompt")
    return ids


def _checked(tokenizer: Any, ids: list[int]) -> list[int]:
    outside = [token for token in ids if not 0 <= token < len(tokenizer)]
    if outside:
        raise InvalidPrompt(
            f"prompt contains token {outside[0]}, but the model's tokens are 0 to {len(tokenizer) - 1}.", "prompt"
        )
    return list(ids)


def _encode_conversation(tokenizer: Any, prompt: Prompt) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidPrompt(
            "This model has no chat template, because it was not trained on conversations; let it continue a text "
            "instead (/completions, or `zeta chat --text`).",
            "messages",
        )
    try:
        text = tokenizer.apply_chat_template(
            prompt.messages, tools=prompt.tools, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything; jinja is not a direct dependency
        reason = str(error).strip().rstrip(".")[:200] or type(error).__name__
        raise InvalidPrompt(f"The model's chat template rejects the conversation: {reason}.", "messages") from error
    return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """The ids with the token that begins a text, if the tokenizer adds one, but without one that ends it."""
    with_special = cast("list[int]", tokenizer(text)["input_ids"])
    if with_special and with_special[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        return with_special[:-1]
    return with_special
