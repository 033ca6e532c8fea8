"""Rendering rows as documents: texts, with the spans of characters that are trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any, cast

from zeta_core.data.documents.conversations import (
    Conversation,
    TrainOn,
    as_turns,
    conversation,
    prompt_and_completion,
    turns_or_text,
)
from zeta_core.data.documents.template import Template, Unlearnable
from zeta_core.data.rows.formats import RowFormat, messages_in, tools_in
from zeta_core.data.sources import Source

DEFAULT_TRAIN_ON: dict[RowFormat, TrainOn] = {
    "text": "all",
    "tokens": "all",
    "messages": "assistant",
    "prompt_completion": "completion",
    "preference": "completion",
    "unpaired_preference": "completion",
}


def train_on_by_format(formats: Iterable[str], masks: Sequence[str] = ()) -> TrainOn | str:
    """The default of ``train_on`` for these formats; if the formats differ, a text that lists each.

    The ``masks`` of rows of ids determine what is trained on.
    """
    meant: dict[str, str] = {name: DEFAULT_TRAIN_ON[cast(RowFormat, name)] for name in formats}
    if "tokens" in meant and masks:
        meant["tokens"] = " and ".join(masks)
    words = sorted(set(meant.values())) or ["all"]
    return words[0] if len(words) == 1 else ", ".join(f"{name}: {word}" for name, word in meant.items())


def without_default(train_on: TrainOn | None, formats: Iterable[RowFormat]) -> TrainOn | None:
    """``train_on``, or ``None`` if it is the default for these formats."""
    is_default = all(name != "tokens" and DEFAULT_TRAIN_ON[name] == train_on for name in formats)
    return None if is_default else train_on  # for rows of ids, 'all' rejects masks that exclude tokens


class Renderer:
    """Renders the rows of conversations and pairs; ``train_on=None`` is the default of each format.

    ``beginning`` are the ids that the tokenizer puts before every text, and ``special`` finds control tokens in plain
    text. ``today`` is the date that chat templates render.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        train_on: TrainOn | None,
        today: date,
        beginning: Sequence[int],
        special: re.Pattern[str] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._train_on: TrainOn | None = train_on
        self._today = today
        self._beginning = beginning
        self._special = special
        self._template: Template | None = None

    @property
    def used_template(self) -> Template | None:
        """The chat template, if a row was rendered with it."""
        return self._template

    def render(self, source: Source, fields: Mapping[str, Any]) -> list[Conversation]:
        """The documents of a row: one conversation, or the chosen and the rejected answer of a preference.

        ``fields`` are the values of `Source.fields`. Raises `Unlearnable` or `InvalidTurn`.
        """
        assert source.row_format is not None
        tools = tools_in(fields)
        train_on = self._train_on or DEFAULT_TRAIN_ON[source.row_format]
        match source.row_format:
            case "messages":
                messages = messages_in(fields, source.drop_fields)
                allow = source.allow_control_tokens
                return [conversation(self._used_template(), messages, tools, train_on, allow_control_tokens=allow)]
            case "prompt_completion":
                prompt = turns_or_text(fields["prompt"], source.drop_fields)
                completion = turns_or_text(fields["completion"], source.drop_fields)
                return [self._answered(source, prompt, completion, tools, train_on)]
            case "unpaired_preference":
                prompt = turns_or_text(fields["prompt"], source.drop_fields)
                completion = turns_or_text(fields["completion"], source.drop_fields)
                return _one_text_each([self._answered(source, prompt, completion, tools)])
            case _:
                prompt, chosen, rejected = (
                    None if fields.get(name) is None else turns_or_text(fields[name], source.drop_fields)
                    for name in ("prompt", "chosen", "rejected")
                )
                prompt, chosen, rejected = split_pair(prompt, chosen, rejected)
                return _one_text_each([self._answered(source, prompt, answer, tools) for answer in (chosen, rejected)])

    def _answered(
        self, source: Source, prompt: Any, completion: Any, tools: Any, train_on: TrainOn = "completion"
    ) -> Conversation:
        return prompt_and_completion(
            self._used_template,
            prompt,
            completion,
            tools,
            train_on,
            special=self._special,
            allow_control_tokens=source.allow_control_tokens,
        )

    def _used_template(self) -> Template:
        """The tokenizer's chat template, which is set to the default one if it has none."""
        if self._template is None:
            self._template = Template(self._tokenizer, self._today, beginning=self._beginning)
        return self._template


def _one_text_each(answers: list[Conversation]) -> list[Conversation]:
    """Return ``answers`` if each is a single text, because its probability is computed at once; else raise."""
    if any(len(answer.texts) > 1 for answer in answers):
        raise Unlearnable(
            "the chat template does not render the turns of the answer as one text; provide an answer of one turn."
        )
    return answers


def split_pair(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt, the chosen and the rejected answer, as texts or lists of turns.

    Without ``prompt``, or if the answers repeat it, the answers are complete texts or conversations with a common
    beginning, which becomes the prompt. Raises `Unlearnable` if the two do not answer the same prompt.
    """
    assert chosen is not None, "`fault_in` requires it"
    assert rejected is not None, "`fault_in` requires it"
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _split_texts(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    chosen, rejected = as_turns(chosen, "assistant"), as_turns(rejected, "assistant")
    prompt_turns = [] if prompt is None else as_turns(prompt, "user")
    repeated = prompt_turns == chosen[: len(prompt_turns)] == rejected[: len(prompt_turns)]
    begun = isinstance(prompt, str) and not chosen[0]["role"] == rejected[0]["role"] == "assistant"
    if prompt is None or begun or repeated:
        shared = 0  # two complete conversations with a common beginning
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if chosen[0] != rejected[0] and not chosen[0]["role"] == rejected[0]["role"] == "assistant":
            raise Unlearnable("chosen and rejected answer different prompts; provide two answers to the same prompt.")
    if any(turns[-1]["role"] != "assistant" for turns in (chosen, rejected)):
        raise Unlearnable("chosen and rejected must each end with an assistant turn.")
    return prompt, chosen, rejected


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common prefix of two texts, up to a space, and the rest of each. The prefix cancels out in the loss."""
    least = min(len(chosen), len(rejected))
    different = next((at for at in range(least) if chosen[at] != rejected[at]), least)
    shared = max(0, *(chosen.rfind(space, 0, different) for space in " \n"))
    return chosen[:shared], chosen[shared:], rejected[shared:]
