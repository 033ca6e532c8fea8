"""Rendering conversations with the tokenizer's chat template, and finding the characters that are trained on.

The text of an assistant turn is found as a prefix difference: the rendered conversation up to and including the turn,
minus the earlier conversation rendered with the generation prompt. This matches inference, where the model gets the
latter and generates the former, so it is correct for any template, with or without ``{% generation %}`` markers. Some
templates render earlier turns differently when later ones follow (Qwen 3 omits their thinking). The turns then do not
fit into one text, so each becomes a separate text, with the history as the template renders it at that point.

If a template has several generation prompts for an answer, the longest one that precedes the answer is used. For
example, Qwen 3 with ``enable_thinking`` false uses an empty thought as the prompt, and the model is then not trained to
generate that thought. If a template appends a generation prompt even without being asked to, it is removed.

All data is untrusted. Templates run in the sandbox of transformers, which does not limit memory and time. The rendering
process therefore has limits for both (`zeta_core.data.confined`), and a text is limited to `MOST_CHARACTERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, Literal, cast

TrainOn = Literal["assistant", "completion", "all"]
Message = dict[str, Any]

# ChatML (OpenAI 2023), with the tokenizer's own end token after each assistant turn. It ends generation with every
# tokenizer, including those without <|im_end|>.
DEFAULT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# Templates get a fixed date, so that the same data gives the same tokens. It is the default date of Llama 3's template.
TODAY = date(2024, 7, 26)
MOST_CHARACTERS = 1 << 24  # limit for a rendered conversation, several times the longest context of any model


class Unlearnable(Exception):
    """A conversation that cannot be trained on. The message completes a sentence that starts with its location."""


@dataclass(frozen=True)
class Text:
    """A training text, and the spans of characters that are trained on.

    A ``plain`` text was not rendered by a template, so the tokenizer's begin and end tokens are added to it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool = False


class Template:
    """The chat template of a tokenizer. If it has none, the default one is set, and saved with the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            tokenizer.chat_template = DEFAULT_TEMPLATE
        self.is_default = tokenizer.chat_template == DEFAULT_TEMPLATE

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False) -> str:
        """Render ``messages``; with ``prompt``, append the generation prompt. Raises `Unlearnable`."""
        if not messages and prompt and self.is_default:
            return "<|im_start|>assistant\n"  # transformers refuses an empty conversation
        try:
            text = self._render(messages, tools, prompt=prompt)
        except (MemoryError, Unlearnable):
            raise
        except Exception as error:  # a template may raise anything; jinja is not a direct dependency
            if not messages:
                raise Unlearnable(
                    "starts with an assistant turn, which the tokenizer's chat template does not support; put a user "
                    "turn before it."
                ) from error
            reason = str(error).strip().rstrip(".")[:200] or type(error).__name__
            raise Unlearnable(f"the tokenizer's chat template rejects the conversation: {reason}.") from error
        for tool in tools or ():
            _refuse_unwritten("has the tool", tool, text)
        return text if prompt else text.removesuffix(self._unconditional_prompt)

    def prompt_without_thinking(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str | None:
        """Render ``messages`` with the generation prompt that disables thinking, or None if there is none."""
        if "enable_thinking" not in self._tokenizer.chat_template:
            return None
        try:
            return self._render(messages, tools, prompt=True, enable_thinking=False)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a template may raise anything, for example if thinking cannot be disabled
            return None

    def _render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, *, prompt: bool, **more: Any
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            date_string=TODAY.strftime("%d %b %Y"),
            strftime_now=TODAY.strftime,
            **more,
        )
        if len(text) > MOST_CHARACTERS:
            raise Unlearnable(
                f"the tokenizer's chat template produced {len(text):,} characters for this row, more than the "
                f"{MOST_CHARACTERS:,} allowed; use a template with less output, or remove the row."
            )
        return text

    @cached_property
    def _unconditional_prompt(self) -> str:
        """The generation prompt if the template appends it to every conversation, as Llama 3's first template does.

        It is found by rendering a conversation without turns. An end token is not a prompt: it ends the conversation.
        """
        asked: list[Message] = [{"role": "user", "content": "Hi"}]
        answered: list[Message] = [*asked, {"role": "assistant", "content": "Hey"}]
        try:
            [nothing] = self._tokenizer.apply_chat_template([[]], tokenize=False)  # a batch of one without turns
            texts = [self._render(turns, prompt=prompt) for turns in (asked, answered) for prompt in (False, True)]
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - if the template rejects conversations, `render` reports it
            return ""
        always = texts[0] == texts[1] and texts[2] == texts[3] and all(text.endswith(nothing) for text in texts)
        return nothing if always and not (self.end and nothing.rstrip().endswith(self.end)) else ""

    @property
    def end(self) -> str:
        return self._tokenizer.eos_token or ""


def conversation(
    template: Template,
    messages: Sequence[Any],
    tools: list[dict[str, Any]] | None,
    train_on: TrainOn,
    *,
    after: int = 0,
) -> list[Text]:
    """The texts of one conversation: usually one, but several if the template changes earlier turns.

    The first ``after`` messages are a prompt, which is not trained on.
    """
    normalized = [plain(message) for message in messages]
    if train_on == "all":
        text = template.render(normalized, tools)
        for message in normalized:
            _refuse_lost_calls(message, text)
        return [Text(text, ((0, len(text)),))]
    turns = [index for index, message in enumerate(normalized) if index >= after and _is_learned(message)]
    if not turns:
        raise Unlearnable("has no assistant turn to train on; remove the row, or add an answer.")
    texts: list[Text] = []
    for turn in turns if train_on == "assistant" else turns[-1:]:
        answered = _answer(template, normalized[:turn], normalized[turn], tools)
        joined = _joined(texts[-1], answered, template.end) if texts else None
        if joined is not None:
            texts.pop()
        texts.append(joined or answered)
    return texts


def _is_learned(message: Message) -> bool:
    """Whether this is an assistant turn that is trained on. ``"weight": 0`` excludes it, as in OpenAI's format."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _answer(template: Template, prompt: Sequence[Message], turn: Message, tools: list[dict[str, Any]] | None) -> Text:
    """The text of a prompt and the turn that answers it, which is trained on. Raises `Unlearnable`."""
    if not (turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content")):
        raise Unlearnable("has an empty assistant turn; remove the turn, or add its content.")
    before = template.render(prompt, tools, prompt=True)
    text = template.render([*prompt, turn], tools)
    thoughtless = template.prompt_without_thinking(prompt, tools)
    if thoughtless is not None and len(thoughtless) > len(before) and text.startswith(thoughtless):
        before = thoughtless
    if not text.startswith(before):
        text = before + _after_the_same_end(template, prompt, tools, before, text)
    if len(text) == len(before):
        raise _not_after_the_prompt()
    _refuse_lost_calls(turn, text[len(before) :])
    return Text(text, ((len(before), len(text)),))


def _not_after_the_prompt() -> Unlearnable:
    return Unlearnable(
        "the tokenizer's chat template does not render the answer directly after the generation prompt, so the text to "
        "train on cannot be determined; use a template that does, or rows of prompt and completion."
    )


def _after_the_same_end(
    template: Template, prompt: Sequence[Message], tools: list[dict[str, Any]] | None, before: str, text: str
) -> str:
    """The answer if the template renders its prompt differently once it is answered. Raises `Unlearnable`.

    For example, Mistral's templates put the system turn before the last user turn, but only if that is the last turn.
    The answer is located by the end of the prompt: the content of its last turn and everything after it.
    """
    asked, last = template.render(prompt, tools), prompt[-1]["content"].strip() if prompt else ""
    if not last or last not in asked or not before.startswith(asked):
        raise _not_after_the_prompt()
    end = before[asked.rindex(last) :]
    if text.count(end) != 1:
        raise _not_after_the_prompt()
    return text.partition(end)[2]


def _joined(earlier: Text, later: Text, end: str) -> Text | None:
    """Both texts as one if the later one continues the earlier one, otherwise ``None``.

    Phi's templates write the end token only after the last turn, in addition to the marker that ends each turn.
    """
    for text in (earlier.text, earlier.text.removesuffix(end)):
        if later.text.startswith(text):
            kept = tuple((start, min(stop, len(text))) for start, stop in earlier.spans)
            return Text(later.text, kept + later.spans)
    return None


def _refuse_lost_calls(turn: Message, text: str) -> None:
    for call in turn.get("tool_calls", ()):
        _refuse_unwritten("calls the tool", call, text)


def _refuse_unwritten(what: str, tool: Any, text: str) -> None:
    """Raise `Unlearnable` if the template omitted a tool or a call, so its name is missing from the text."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = cast("Mapping[str, Any]", inner).get("name") if isinstance(inner, Mapping) else None
    if isinstance(name, str) and name not in text:
        raise Unlearnable(
            f"{what} {name!r}, which the tokenizer's chat template omits; use a template that supports tools."
        )


def prompt_and_completion(
    template: Callable[[], Template],
    prompt: Any,
    completion: Any,
    tools: list[dict[str, Any]] | None,
    train_on: TrainOn,
) -> list[Text]:
    """The text of a prompt and a completion: two texts are concatenated, and conversations are rendered.

    If only one of them is a conversation, the other one becomes a turn of the user or the assistant.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
        if tools:
            raise Unlearnable("has tools, which plain text does not support; use messages instead of texts.")
        if train_on == "assistant":
            raise Unlearnable("is plain text, which has no assistant turns; use train_on 'completion' or 'all'.")
        return [Text(text, ((0 if train_on == "all" else len(prompt), len(text)),), plain=True)]
    asked, answered = turns_of(prompt, "user"), turns_of(completion, "assistant")
    if train_on != "completion":
        return conversation(template(), [*asked, *answered], tools, train_on)
    return conversation(template(), [*asked, *answered], tools, "assistant", after=len(asked))


def turns_of(content: Any, role: str) -> list[Any]:
    """A list of messages, from a list, a single message, or a text of ``role``."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    return [content] if isinstance(content, Mapping) else content


def plain(message: Mapping[str, Any]) -> Message:
    """A message as templates expect it: text content, tool arguments as objects, and no null fields."""
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
    """A tool call with its arguments as an object, parsed if they are JSON text as in OpenAI's API."""
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
            raise Unlearnable("a tool call has arguments that are not valid JSON.") from None
    if isinstance(function, Mapping):
        called["function"] = inner
    return called
