"""Finding the characters of a conversation that are trained on, in the text that the chat template renders.

The text of an assistant turn is found as a prefix difference: the rendered conversation up to and including the turn,
minus the earlier conversation rendered with the generation prompt. This matches inference, where the model gets the
latter and generates the former, so it is correct for any template, with or without ``{% generation %}`` markers. Some
templates render earlier turns differently when later ones follow (Qwen 3 omits their thinking). The turns then do not
fit into one text, so each becomes a separate text, with the history as the template renders it at that point.

If a template has several generation prompts for an answer, the longest one that precedes the answer is used. For
example, Qwen 3 with ``enable_thinking`` false uses an empty thought as the prompt, and the model is then not trained to
generate that thought. If a template appends a generation prompt even if none was requested, it is removed.

Reasoning is part of the answer. Templates such as DeepSeek R1's remove it from finished turns, because they are only
used for prompts. The text of such an answer is then the prompt, the reasoning and answer as the model generates them,
and what the template writes after an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from zeta_core.data.documents import control_tokens, coverage
from zeta_core.data.documents.template import Template, Tools, Unlearnable
from zeta_core.data.rows.turns import REASONING, InvalidTurn, Message, read_turn

TrainOn = Literal["assistant", "completion", "all"]

# How models mark their reasoning: <think> (DeepSeek R1, Qwen 3) and [THINK] (Magistral). An opening mark at the end of
# a generation prompt, and a whole thought at the beginning of an answer.
_OPENING = re.compile(r"(<think>|\[THINK\])\s*\Z")
_THOUGHT = re.compile(r"\s*(?:<think>.*?</think>|\[THINK\].*?\[/THINK\])", re.DOTALL)
_CLOSING = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_PLACEHOLDER = "ZETAANSWER"


@dataclass(frozen=True)
class Text:
    """A training text and the ranges of its characters that are trained on (``spans``).

    ``literals`` are the ranges that look like control tokens but are encoded as text. A ``plain`` text was not rendered
    by a template, so the tokenizer's begin and end tokens are added to it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool = False
    literals: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """The texts of a conversation: usually one, but several if the template changes earlier turns."""

    texts: list[Text]
    num_control_tokens: int = 0  # in the texts of the data
    has_unused_turns: bool = False  # after the last turn that is trained on


def read_turns(turns: Sequence[object], drop: Sequence[str] = ()) -> list[Message]:
    """Read the turns of a conversation, without the fields named in ``drop``. Raises `Unlearnable`."""
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(read_turn(turn, drop))
        except InvalidTurn as error:
            raise Unlearnable(f"message {number} {error}") from None
    return messages


def conversation(
    template: Template,
    messages: Sequence[Message],
    tools: Tools | None,
    train_on: TrainOn,
    *,
    after: int = 0,
    allow_control_tokens: bool = False,
) -> Conversation:
    """The texts of one conversation. Control tokens in it are text unless they are allowed. Raises `Unlearnable`.

    The first ``after`` messages are a prompt, which is not trained on.
    """
    messages = [_for_template(message, template) for message in messages]
    if control_tokens.has_marks([messages, tools]):
        raise Unlearnable("contains U+FDD0 or U+FDD1, which Unicode reserves for internal use; remove the character.")
    turns = _trained_turns(messages, train_on, after)
    texts = _texts(template, messages, tools, turns)
    _check_complete(template, messages, tools, texts, turns)
    marked, marked_tools, count = template.mark(messages, tools)
    if count and not allow_control_tokens:
        literal = [_unmarked(text) for text in _texts(template, marked, marked_tools, turns)]
        if [replace(text, literals=()) for text in literal] != texts:
            raise Unlearnable(
                "contains a control token as text that the tokenizer's chat template processes itself; set "
                '"allow_control_tokens": true in the source, or remove it from the text.'
            )
        texts = literal
    return Conversation(texts, count, turns is not None and turns[-1] + 1 < len(messages))


def _for_template(message: Message, template: Template) -> Message:
    """A developer turn becomes a system turn unless the template knows developer turns, as gpt-oss does."""
    if message["role"] == "developer" and "developer" not in template.source():
        return {**message, "role": "system"}
    return message


def _unmarked(text: Text) -> Text:
    unmarked = control_tokens.unmark(text.text)
    spans = tuple((unmarked.position(start), unmarked.position(end)) for start, end in text.spans)
    return replace(text, text=unmarked.text, spans=spans, literals=unmarked.literals)


def _trained_turns(messages: Sequence[Message], train_on: TrainOn, after: int) -> list[int] | None:
    """The turns that are trained on; ``None`` if the whole text is. ``"weight": 0`` excludes a turn (OpenAI's API)."""
    if train_on == "all":
        if any(message.get("weight") == 0 for message in messages):
            raise Unlearnable("has a turn of weight 0, but train_on 'all' trains on every turn; remove one of them.")
        return None
    turns = [
        index
        for index, message in enumerate(messages)
        if index >= after and message["role"] == "assistant" and message.get("weight") != 0
    ]
    if not turns:
        raise Unlearnable("has no assistant turn to train on; remove the row, or add an answer.")
    return turns if train_on == "assistant" else turns[-1:]


def _texts(
    template: Template, messages: Sequence[Message], tools: Tools | None, turns: Sequence[int] | None
) -> list[Text]:
    if turns is None:
        text = template.render(messages, tools)
        return [Text(text, ((0, len(text)),))]
    texts: list[Text] = []
    for turn in turns:
        answered = _answer(template, messages[:turn], messages[turn], tools)
        joined = _joined(texts[-1], answered, template.end) if texts else None
        if joined is not None:
            texts.pop()
        texts.append(joined or answered)
    return texts


def _check_complete(
    template: Template,
    messages: Sequence[Message],
    tools: Tools | None,
    texts: Sequence[Text],
    turns: Sequence[int] | None,
) -> None:
    """Raise `Unlearnable` if the texts lack a part of the conversation."""

    def view(messages: Sequence[Message], index: int) -> str:
        if turns is not None:
            answers = (at for at in range(index, len(messages)) if messages[at]["role"] == "assistant")
            for at in answers:
                try:
                    return _answer(template, messages[:at], messages[at], tools).text
                except Unlearnable:
                    break
        return template.render(messages, tools)

    used = messages if turns is None else messages[: turns[-1] + 1]  # the caller reports the others
    seen = "\n".join(text.text for text in texts)
    coverage.check_tools(template, tools, seen, lambda tools: template.render(messages, tools))
    coverage.check_turns(template, used, tools, seen, view)


def _answer(template: Template, prompt: Sequence[Message], turn: Message, tools: Tools | None) -> Text:
    """The text of a prompt and the turn that answers it, which is trained on. Raises `Unlearnable`."""
    if not (turn["content"].strip() or turn.get("tool_calls") or any(map(turn.get, REASONING))):
        raise Unlearnable("has an empty assistant turn; remove the turn, or add its content.")
    before = template.render(prompt, tools, prompt=True)
    text = template.render([*prompt, turn], tools)
    opening = _OPENING.search(before)
    answer = _answer_with_lost_reasoning(turn, text, opening)
    if answer is not None:
        if opening is not None:  # the prompt already contains the opening mark
            answer = answer.removeprefix(opening[1])
            answer = answer.removeprefix("\n") if before.endswith("\n") else answer
        return _trained(before, before + answer + _after_answer(template, prompt, turn, tools))
    thoughtless = template.prompt_without_thinking(prompt, tools)
    if thoughtless is not None and len(thoughtless) > len(before) and text.startswith(thoughtless):
        before = thoughtless
    if opening is not None and not text.startswith(before) and text.startswith(before[: opening.start()]):
        before = before[: opening.start()]  # an answer without reasoning, which the template renders without a mark
    if not text.startswith(before):
        text = before + _after_the_same_end(template, prompt, tools, before, text)
    return _trained(before, text)


def _trained(before: str, text: str) -> Text:
    if len(text) == len(before):
        raise _not_after_the_prompt()
    return Text(text, ((len(before), len(text)),))


def _answer_with_lost_reasoning(turn: Message, text: str, opening: re.Match[str] | None) -> str | None:
    """The answer with its reasoning as the model generates it, if the template removed the reasoning; or ``None``.

    A field with reasoning is written the way the generation prompt begins it, so it needs a prompt that does.
    """
    content = turn["content"]
    thought = _THOUGHT.match(content)
    if thought is not None:
        return content.lstrip() if coverage.squeezed(thought[0]) not in coverage.squeezed(text) else None
    reasoning = next((turn[name] for name in REASONING if turn.get(name)), None)
    if reasoning is None or opening is None or coverage.squeezed(reasoning) in coverage.squeezed(text):
        return None
    return f"{opening[1]}\n{reasoning.strip()}\n{_CLOSING[opening[1]]}\n\n{content}"


def _after_answer(template: Template, prompt: Sequence[Message], turn: Message, tools: Tools | None) -> str:
    """The text that the template writes after the content of an answer, such as an end token."""
    answer = {name: value for name, value in turn.items() if name not in REASONING}
    text = template.render([*prompt, {**answer, "content": _PLACEHOLDER}], tools)
    if _PLACEHOLDER not in text:
        raise _not_after_the_prompt()
    return text.rpartition(_PLACEHOLDER)[2]


def _not_after_the_prompt() -> Unlearnable:
    return Unlearnable(
        "the tokenizer's chat template does not render the answer directly after the generation prompt, so the text to "
        "train on cannot be determined; set chat_template to one that does, or use rows of prompt and completion."
    )


def _after_the_same_end(
    template: Template, prompt: Sequence[Message], tools: Tools | None, before: str, text: str
) -> str:
    """The answer if the template renders its prompt differently once it is answered. Raises `Unlearnable`.

    For example, Mistral's templates put the system turn before the last user turn, but only if that is the last turn.
    The answer is located by the end of the prompt: the content of its last turn and everything after it.
    """
    history, last = template.render(prompt, tools), prompt[-1]["content"].strip() if prompt else ""
    if not last or last not in history or not before.startswith(history):
        raise _not_after_the_prompt()
    end = before[history.rindex(last) :]
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


def prompt_and_completion(
    template: Callable[[], Template],
    prompt: str | list[Message],
    completion: str | list[Message],
    tools: Tools | None,
    train_on: TrainOn,
    *,
    special: re.Pattern[str] | None = None,
    allow_control_tokens: bool = False,
) -> Conversation:
    """The text of a prompt and a completion: two texts are concatenated, and conversations are rendered.

    If only one of them is a conversation, the other one becomes a turn of the user or the assistant. ``special`` finds
    the control tokens in plain text.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
        if tools:
            raise Unlearnable("has tools, which plain text does not support; use messages instead of texts.")
        if train_on == "assistant":
            raise Unlearnable("is plain text, which has no assistant turns; use train_on 'completion' or 'all'.")
        ranges = control_tokens.find(text, special)
        literals = () if allow_control_tokens else ranges
        start = 0 if train_on == "all" else len(prompt)
        return Conversation([Text(text, ((start, len(text)),), plain=True, literals=literals)], len(ranges))
    question, answered = as_turns(prompt, "user"), as_turns(completion, "assistant")
    after = 0 if train_on != "completion" else len(question)
    return conversation(
        template(),
        [*question, *answered],
        tools,
        "assistant" if train_on == "completion" else train_on,
        after=after,
        allow_control_tokens=allow_control_tokens,
    )


def as_turns(content: str | list[Message], role: str) -> list[Message]:
    """A conversation; a text becomes a turn of ``role``."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def turns_or_text(content: Any, drop: Sequence[str]) -> str | list[Message]:
    """A text as it is, or the turns of a conversation or a single turn. Raises `Unlearnable`."""
    if isinstance(content, str):
        return content
    return read_turns([content] if isinstance(content, Mapping) else content, drop)
