"""Splitting preference rows into a prompt and two answers, whichever of their parts contain the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zeta_core.data import chat
from zeta_core.data.chat import Conversation
from zeta_core.data.template import Unlearnable


def split_pair(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt, the chosen and the rejected answer, as texts or lists of turns.

    Without ``prompt``, or if the answers repeat it, the answers are complete texts or conversations with a common
    beginning, which becomes the prompt. Raises `Unlearnable` if the two do not answer the same prompt.
    """
    assert chosen is not None, "`fault_in` requires it"
    assert rejected is not None, "`fault_in` requires it"
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _split_texts(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    chosen, rejected = chat.as_turns(chosen, "assistant"), chat.as_turns(rejected, "assistant")
    asked = [] if prompt is None else chat.as_turns(prompt, "user")
    repeated = asked == chosen[: len(asked)] == rejected[: len(asked)]
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


def check_answers(answers: Sequence[Conversation]) -> None:
    """Raise `Unlearnable` if the chat template splits an answer into several texts."""
    if any(len(answer.texts) > 1 for answer in answers):
        raise Unlearnable(
            "the chat template does not render the turns of the answer as one text; provide an answer of one turn."
        )


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common prefix of two texts, up to a space, and the rest of each. The prefix cancels out in the loss."""
    least = min(len(chosen), len(rejected))
    different = next((at for at in range(least) if chosen[at] != rejected[at]), least)
    shared = max(0, *(chosen.rfind(space, 0, different) for space in " \n"))
    return chosen[:shared], chosen[shared:], rejected[shared:]
