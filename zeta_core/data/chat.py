"""Conversations as the text that a model reads, and which characters of it are learned.

The template is the tokenizer's own. What an assistant's turn adds is found by prefix difference: the conversation up to
and with the turn, less the conversation before it with the prompt for an answer. That is what the model is given and
what it has to say when it is used, so it is right for any template, marked with ``{% generation %}`` or not. Where a
template writes earlier turns otherwise once later ones follow (Qwen 3 leaves out their thinking), the turns do not fit
into one text: each then becomes a text of its own, with the history as the template writes it at that point.

Of the prompts that a template has for one answer, the longest that the answer follows counts: where it prompts for an
answer without thinking by an empty thought (Qwen 3 with ``enable_thinking`` false), an answer without one is not taught
to write that. A prompt that is written after the last turn whether asked for or not is none of the conversation.

Trusted: nothing. Templates run in the sandbox of transformers, which keeps them from everything but memory and time:
the process that renders has limits of both (`zeta_core.data.confined`), and a text has `MOST_CHARACTERS`.
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
# What templates call today, so that the same data gives the same tokens: the date that Llama 3's fall back to.
TODAY = date(2024, 7, 26)
MOST_CHARACTERS = 1 << 24  # of a rendered conversation: several times the longest context of any model


class Unlearnable(Exception):
    """A conversation that cannot be trained on; the message ends a sentence that begins with its place."""


@dataclass(frozen=True)
class Text:
    """What a model reads, and the spans of characters in it that it learns to write.

    ``plain``: no template wrote it, so it begins and ends with the tokens that the tokenizer has for that.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool = False


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
        try:
            text = self._render(messages, tools, prompt=prompt)
        except (MemoryError, Unlearnable):
            raise
        except Exception as error:  # a template may raise anything; jinja's own class is not ours to import
            said = str(error).strip().rstrip(".")[:200] or type(error).__name__
            if not messages:
                said = "begins with an assistant turn, which the tokenizer's chat template cannot prompt for"
                raise Unlearnable(f"{said}; put a user's turn before it.") from error
            raise Unlearnable(f"the tokenizer's chat template refuses the conversation: {said}.") from error
        for tool in tools or ():
            _refuse_unwritten("has the tool", tool, text)
        return text if prompt else text.removesuffix(self._written_anyway)

    def prompt_without_thinking(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str | None:
        """The text of ``messages`` with the beginning of an answer that does not think; None where there is none."""
        if "enable_thinking" not in self._tokenizer.chat_template:
            return None
        try:
            return self._render(messages, tools, prompt=True, enable_thinking=False)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a template may raise anything, as for a model that always thinks
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
                f"the tokenizer's chat template wrote {len(text):,} characters for this row, more than the "
                f"{MOST_CHARACTERS:,} allowed; use a template that writes less, or remove the row."
            )
        return text

    @cached_property
    def _written_anyway(self) -> str:
        """The prompt for an answer where the template ends every conversation with it, as Llama 3's first one does.

        It is what the template writes of no turn at all. An end token there is none: it ends the conversation.
        """
        asked: list[Message] = [{"role": "user", "content": "Hi"}]
        answered: list[Message] = [*asked, {"role": "assistant", "content": "Hey"}]
        try:
            [nothing] = self._tokenizer.apply_chat_template([[]], tokenize=False)  # a batch of one without turns
            texts = [self._render(turns, prompt=prompt) for turns in (asked, answered) for prompt in (False, True)]
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a template that refuses this, whatever it raises, is told by `render`
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
    """The texts of one conversation: one, or several where the template changes earlier turns.

    The first ``after`` messages are a prompt, of which nothing is learned.
    """
    said = [plain(message) for message in messages]
    if train_on == "all":
        text = template.render(said, tools)
        for message in said:
            _refuse_lost_calls(message, text)
        return [Text(text, ((0, len(text)),))]
    turns = [index for index, message in enumerate(said) if index >= after and _is_learned(message)]
    if not turns:
        raise Unlearnable("has no assistant turn, so there is nothing to learn from it; remove it, or add the answer.")
    texts: list[Text] = []
    for turn in turns if train_on == "assistant" else turns[-1:]:
        answered = _answer(template, said[:turn], said[turn], tools)
        joined = _joined(texts[-1], answered, template.end) if texts else None
        if joined is not None:
            texts.pop()
        texts.append(joined or answered)
    return texts


def _is_learned(message: Message) -> bool:
    """Whether this is an assistant's turn, and not one that is marked as history (``"weight": 0``, as OpenAI's)."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _answer(template: Template, prompt: Sequence[Message], turn: Message, tools: list[dict[str, Any]] | None) -> Text:
    """The text of a prompt and the turn that answers it, which is learned. Raises `Unlearnable`."""
    if not (turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content")):
        raise Unlearnable(
            "has an assistant turn that says nothing, so there is nothing to learn; remove it, or fill it."
        )
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
        "the tokenizer's chat template does not write the answer after the prompt for it, so what the model would "
        "have to say cannot be told; give the tokenizer a template that does, or rows of prompt and completion."
    )


def _after_the_same_end(
    template: Template, prompt: Sequence[Message], tools: list[dict[str, Any]] | None, before: str, text: str
) -> str:
    """The answer where its prompt is written otherwise once it is answered, found by how the prompt ends.

    Mistral's templates put the system turn before the last user's, and only while that is the last turn of all. The
    end is the last turn's content with all that follows it. Raises `Unlearnable`.
    """
    asked, last = template.render(prompt, tools), prompt[-1]["content"].strip() if prompt else ""
    if not last or last not in asked or not before.startswith(asked):
        raise _not_after_the_prompt()
    end = before[asked.rindex(last) :]
    if text.count(end) != 1:
        raise _not_after_the_prompt()
    return text.partition(end)[2]


def _joined(earlier: Text, later: Text, end: str) -> Text | None:
    """Both in one text, where the later one goes on with the earlier; ``None`` where it is written otherwise there.

    Phi's templates write the end token after the last turn alone, behind the mark that ends each.
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
    """Raise `Unlearnable` where a template left out a tool or a call: its name is nowhere in the text."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = cast("Mapping[str, Any]", inner).get("name") if isinstance(inner, Mapping) else None
    if isinstance(name, str) and name not in text:
        raise Unlearnable(
            f"{what} {name!r}, which the tokenizer's chat template does not write; use a tokenizer whose template "
            "knows tools."
        )


def prompt_and_completion(
    template: Callable[[], Template],
    prompt: Any,
    completion: Any,
    tools: list[dict[str, Any]] | None,
    train_on: TrainOn,
) -> list[Text]:
    """The text of a pair of texts, as it stands, or of two conversations by the template.

    Where one of them has turns and the other is a text, that is a turn: the user's, or the assistant's.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
        if tools:
            raise Unlearnable("has tools, which a plain text has no place for; give messages instead of texts.")
        if train_on == "assistant":
            raise Unlearnable("is plain text, which has no assistant turns; use train_on 'completion' or 'all'.")
        return [Text(text, ((0 if train_on == "all" else len(prompt), len(text)),), plain=True)]
    asked, answered = turns_of(prompt, "user"), turns_of(completion, "assistant")
    if train_on != "completion":
        return conversation(template(), [*asked, *answered], tools, train_on)
    return conversation(template(), [*asked, *answered], tools, "assistant", after=len(asked))


def turns_of(said: Any, role: str) -> list[Any]:
    """Messages as they are, a single one, or a text as what ``role`` says."""
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    return [said] if isinstance(said, Mapping) else said


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
