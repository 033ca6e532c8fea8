"""Conversations as the text that a model reads, and which characters of it are learned.

The template is the tokenizer's own. What an assistant's turn adds is found by prefix difference: the conversation up to
and with the turn, less the conversation before it with the prompt for an answer. That is what the model is given and
what it has to say when it is used, so it is right for any template, marked with ``{% generation %}`` or not. Where a
template writes earlier turns otherwise once later ones follow (Qwen 3 leaves out their thinking), the turns do not fit
into one text: each then becomes a text of its own, with the history as the template writes it at that point.

Trusted: nothing. Templates run in the sandbox of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

TrainOn = Literal["assistant", "completion", "all"]
Message = dict[str, Any]

# ChatML (OpenAI 2023), with the tokenizer's own end token after the assistant's turns: it ends generation in every
# tokenizer, also in those that know no <|im_end|>.
DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# What Llama 3's templates call today: the date they fall back to themselves. The same data gives the same tokens.
DATE = "26 Jul 2024"


class Unlearnable(Exception):
    """A conversation that cannot be trained on; the message ends a sentence that begins with its place."""


@dataclass(frozen=True)
class Text:
    """What a model reads, and the spans of characters in it that it learns to write; ``ends`` adds the end token."""

    text: str
    spans: tuple[tuple[int, int], ...]
    ends: bool = False


class Template:
    """The chat template of a tokenizer, or the default one, which is then set on it and saved with it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        self.is_default = tokenizer.chat_template == DEFAULT_TEMPLATE

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False) -> str:
        """The text of ``messages``, with the beginning of an answer where ``prompt``. Raises `Unlearnable`."""
        if not messages and prompt and self.is_default:
            return "<|im_start|>assistant\n"  # transformers refuses an empty conversation
        if self.is_default and (tools or any("tool_calls" in message for message in messages)):
            raise Unlearnable("has tools, and the default chat template has no place for them; give the tokenizer one.")
        try:
            return cast(
                str,
                self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, date_string=DATE
                ),
            )
        except Exception as error:  # a template may raise anything; jinja's own class is not ours to import
            said = str(error).strip().rstrip(".")[:200] or type(error).__name__
            if not messages:
                said = "begins with an assistant turn, which the tokenizer's chat template cannot prompt for"
                raise Unlearnable(f"{said}; put a user's turn before it.") from error
            raise Unlearnable(f"the tokenizer's chat template refuses the conversation: {said}.") from error


def conversation(
    template: Template,
    messages: Sequence[Any],
    tools: list[dict[str, Any]] | None,
    train_on: TrainOn,
    *,
    after: int = 0,
) -> list[Text]:
    """The texts of one conversation: one, or several where the template changes earlier turns.

    The first ``after`` messages are a prompt, of which nothing is learned.
    """
    said = [plain(message) for message in messages]
    if train_on == "all":
        text = template.render(said, tools)
        return [Text(text, ((0, len(text)),))]
    turns = [index for index, message in enumerate(said) if message["role"] == "assistant" and index >= after]
    if not turns:
        raise Unlearnable("has no assistant turn, so there is nothing to learn from it; remove it, or add the answer.")
    texts: list[Text] = []
    for turn in turns if train_on == "assistant" else turns[-1:]:
        answered = _answer(template, said[:turn], said[turn], tools)
        if texts and answered.text.startswith(texts[-1].text):
            earlier = texts.pop()
            answered = Text(answered.text, earlier.spans + answered.spans)
        texts.append(answered)
    return texts


def _answer(template: Template, prompt: Sequence[Message], turn: Message, tools: list[dict[str, Any]] | None) -> Text:
    """The text of a prompt and the turn that answers it, which is learned. Raises `Unlearnable`."""
    before = template.render(prompt, tools, prompt=True)
    text = template.render([*prompt, turn], tools)
    if not text.startswith(before) or len(text) == len(before):
        raise Unlearnable(
            "the tokenizer's chat template does not write the answer after the prompt for it, so what the model would "
            "have to say cannot be told; give the tokenizer a template that does, or rows of prompt and completion."
        )
    return Text(text, ((len(before), len(text)),))


def prompt_and_completion(
    template: Template | None, prompt: Any, completion: Any, tools: list[dict[str, Any]] | None, train_on: TrainOn
) -> list[Text]:
    """The text of a pair of texts, as it stands with the end token, or of two lists of messages."""
    if isinstance(prompt, str):
        text = prompt + cast(str, completion)
        if train_on == "assistant":
            raise Unlearnable("is plain text, which has no assistant turns; use train_on 'completion' or 'all'.")
        return [Text(text, ((0 if train_on == "all" else len(prompt), len(text)),), ends=True)]
    assert template is not None
    if train_on != "completion":
        return conversation(template, [*prompt, *completion], tools, train_on)
    return conversation(template, [*prompt, *completion], tools, "assistant", after=len(prompt))


def plain(message: Mapping[str, Any]) -> Message:
    """A message as templates expect it: text content, tool arguments as objects, no empty fields of a table."""
    kept = {name: value for name, value in message.items() if value is not None}
    content = kept.get("content", "")
    if isinstance(content, list):
        content = "".join(part["text"] for part in cast("list[dict[str, Any]]", content))
    kept["content"] = content
    if kept.get("tool_calls"):
        kept["tool_calls"] = [_call(call) for call in kept["tool_calls"]]
    else:
        kept.pop("tool_calls", None)
    return kept


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object, also where they are its JSON text, as OpenAI's API writes them."""
    if not isinstance(call, Mapping):
        return call
    called = {name: value for name, value in cast("Mapping[str, Any]", call).items() if value is not None}
    function = called.get("function")
    inner = dict(cast("Mapping[str, Any]", function)) if isinstance(function, Mapping) else called
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            inner["arguments"] = json.loads(arguments)
        except ValueError:
            raise Unlearnable("a tool call has arguments that are not JSON.") from None
    if isinstance(function, Mapping):
        called["function"] = inner
    return called
