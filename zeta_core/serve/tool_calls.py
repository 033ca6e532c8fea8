"""Finding tool calls in the text of an answer, for the families of models whose format is known.

The format follows from the chat template, which shows the model its own earlier calls. Text in another format is left
as it is.

| format  | the text of a call                                      | models                       |
|---------|---------------------------------------------------------|------------------------------|
| hermes  | ``<tool_call>{"name", "arguments"}</tool_call>``        | Hermes, Qwen 2.5, Qwen 3     |
| mistral | ``[TOOL_CALLS][{"name", "arguments"}, ...]``            | Mistral                      |
| llama   | ``{"name", "parameters"}``, the whole answer            | Llama 3                      |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, cast

from zeta_core.contract.wire.answers import ToolCall

Format = Literal["hermes", "mistral", "llama"]
_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_PYTHON = "<|python_tag|>"


def tool_format(template: str) -> Format | None:
    """The format of the calls that this chat template shows the model."""
    if "<tool_call>" in template and "<function=" not in template:  # Qwen 3 Coder writes XML
        return "hermes"
    if _MISTRAL in template:
        return "mistral"
    if "ipython" in template and '"parameters"' in template:
        return "llama"
    return None


def starts_call(text: str, form: Format) -> int | None:
    """The position from which ``text`` is, or may become, a tool call; ``None`` if all of it is an ordinary answer."""
    marker = {"hermes": "<tool_call>", "mistral": _MISTRAL}.get(form)
    if marker is None:
        return 0 if not text.strip() or text.lstrip().startswith(("{", _PYTHON[: len(text.lstrip())])) else None
    if marker in text:
        return text.index(marker)
    held = next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
    return len(text) - held if held else None


def parse_calls(text: str, form: Format) -> tuple[str, list[ToolCall]]:
    """The ordinary text before the calls, and the calls; none if the text is not valid in this format."""
    match form:
        case "hermes":
            before, found = text.partition("<tool_call>")[0], _HERMES.findall(text)
        case "mistral":
            before, _, rest = text.partition(_MISTRAL)
            found = [rest] if rest else []
        case "llama":
            before, found = "", [text.strip().removeprefix(_PYTHON)]
    try:
        calls = [call for text_of_call in found for call in _calls(json.loads(text_of_call))]
    except (ValueError, KeyError, TypeError):
        return text, []
    return (before.rstrip(), calls) if calls else (text, [])


def _calls(value: Any) -> Iterator[ToolCall]:
    """Raises `KeyError` or `TypeError` for anything but a call or a list of calls."""
    for call in cast("list[Any]", value) if isinstance(value, list) else [value]:
        arguments = call["arguments"] if "arguments" in call else call["parameters"]
        if not isinstance(call["name"], str):
            raise TypeError
        yield ToolCall(
            name=call["name"],
            arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
        )
