"""Checking that a chat template renders everything that a conversation contains.

A template silently ignores the fields that it does not know. To find these, a value is changed, and the conversation is
rendered again: a text has a sentinel appended, which must appear in the result; any other value is removed, which must
change the result. This is done once for each shape of a turn (its role, fields and neighbours). The content of every
turn is also searched in the rendered text, because a template can remove a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

from zeta_core.data.documents.template import Template, Tools, Unlearnable
from zeta_core.data.rows.turns import REASONING, Message

_SENTINEL = "ZETASENTINEL"
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")  # templates split texts at tags such as </think>
_MAX_TAGS = 10
# Fields that link or weight turns. They are used, although templates do not render them.
_NOT_RENDERED = {"role", "content", "weight", "tool_call_id", "tool_calls"}

# Renders a conversation so that the turn with the given index is as complete as the template ever renders it.
View = Callable[[Sequence[Message], int], str]


def check_turns(template: Template, messages: Sequence[Message], tools: Tools | None, seen: str, view: View) -> None:
    """Raise `Unlearnable` if the template does not render a part of a turn. ``seen`` is all of the rendered text."""
    rendered = squeezed(seen)
    for index, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            _reject_unwritten(f"message {index + 1} calls the tool", call, seen)
        shape = _shape(messages, index, tools)
        if shape not in template.checked_shapes:
            _check_fields(messages, index, view)
            template.checked_shapes.add(shape)
        for name in ("content", *REASONING):
            text = message.get(name)
            if isinstance(text, str) and squeezed(text) not in rendered:
                _check_positions(messages, index, name, view)


def check_tools(template: Template, tools: Tools | None, seen: str, view: Callable[[Tools], str]) -> None:
    """Raise `Unlearnable` if the template does not render the tools of a conversation."""
    for tool in tools or ():
        _reject_unwritten("has the tool", tool, seen)
    if tools and "tools" not in template.checked_shapes:
        function = {"name": _SENTINEL, "description": "d", "parameters": {"type": "object", "properties": {}}}
        if _SENTINEL not in _or_sentinel(lambda: view([{"type": "function", "function": function}])):
            _reject_unwritten("has the tool", tools[0], "")
        template.checked_shapes.add("tools")


def _shape(messages: Sequence[Message], index: int, tools: Tools | None) -> object:
    message = messages[index]
    before = messages[index - 1]["role"] if index else None
    after = messages[index + 1]["role"] if index + 1 < len(messages) else None
    fields = frozenset(name for name, value in message.items() if value != "")
    return (message["role"], fields, before, after, bool(tools), len(message.get("tool_calls", ())))


def _check_fields(messages: Sequence[Message], index: int, view: View) -> None:
    message = messages[index]
    original = view(messages, index)
    if message["content"].strip() and not _is_rendered(messages, index, "content", view):
        raise _incomplete(index, "content")
    lost = [
        name
        for name, value in message.items()
        if name not in _NOT_RENDERED
        and not _is_known_name(messages, index, name)
        and not (
            _is_rendered(messages, index, name, view)
            if isinstance(value, str)
            else _or_sentinel(lambda name=name: view(_without(messages, index, name), index)) != original
        )
    ]
    if lost:
        raise _ignored(index, lost)
    for number, call in enumerate(message.get("tool_calls", ())):
        function = call.get("function", call)
        if function.get("arguments"):
            changed = {**function, "arguments": {_SENTINEL.lower(): _SENTINEL}}
            calls = list(message["tool_calls"])
            calls[number] = {**call, "function": changed} if "function" in call else changed
            if _SENTINEL not in _or_sentinel(
                lambda calls=calls: view(_with(messages, index, "tool_calls", calls), index)
            ):
                _reject_unwritten(f"message {index + 1} calls the tool", call, "")


def _is_known_name(messages: Sequence[Message], index: int, field: str) -> bool:
    """Whether the field is the name of a tool on its result, which an earlier call contains, too."""
    if field != "name" or messages[index]["role"] != "tool":
        return False
    calls = [call for message in messages[:index] for call in message.get("tool_calls", ())]
    return messages[index]["name"] in [call.get("function", call).get("name") for call in calls]


def _is_rendered(messages: Sequence[Message], index: int, name: str, view: View) -> bool:
    """Whether the template renders the end of a text."""
    longer = _with(messages, index, name, messages[index][name] + _SENTINEL)
    return _SENTINEL in _or_sentinel(lambda: view(longer, index))


def _check_positions(messages: Sequence[Message], index: int, name: str, view: View) -> None:
    """Raise `Unlearnable` unless the template renders the beginning and the end of a text, and around each tag in it.

    The text in between may be rendered differently, such as with escapes.
    """
    text = messages[index][name]
    positions = {0, len(text), *(at for tag in islice(_TAG.finditer(text), _MAX_TAGS) for at in tag.span())}
    for position in sorted(positions):
        changed = _with(messages, index, name, f"{text[:position]}{_SENTINEL}{text[position:]}")
        if _SENTINEL not in _or_sentinel(lambda changed=changed: view(changed, index)):
            raise _incomplete(index, name)


def _or_sentinel(render: Callable[[], str]) -> str:
    """The rendered text. If the template rejects a changed value, it reads the value, and the sentinel is returned."""
    try:
        return render()
    except Unlearnable:
        return _SENTINEL


def _with(messages: Sequence[Message], index: int, name: str, value: Any) -> list[Message]:
    return [*messages[:index], {**messages[index], name: value}, *messages[index + 1 :]]


def _without(messages: Sequence[Message], index: int, name: str) -> list[Message]:
    kept = {field: value for field, value in messages[index].items() if field != name}
    return [*messages[:index], kept, *messages[index + 1 :]]


def squeezed(text: str) -> str:
    """The text without white space, which templates may change."""
    return "".join(text.split())


def _incomplete(index: int, name: str) -> Unlearnable:
    what = "all of its content" if name == "content" else f"all of its {name!r}"
    fix = "change the turn" if name == "content" else f'drop the field with "drop_fields": ["{name}"] in the source'
    return Unlearnable(
        f"message {index + 1}: the tokenizer's chat template does not render {what}; set chat_template to a template "
        f"that does, or {fix}."
    )


def _ignored(index: int, names: Sequence[str]) -> Unlearnable:
    shown = ", ".join(map(repr, names))
    listed = ", ".join(f'"{name}"' for name in names)
    return Unlearnable(
        f"message {index + 1} has {shown}, which the tokenizer's chat template does not render; set chat_template to a "
        f'template that does, or drop it with "drop_fields": [{listed}] in the source.'
    )


def _reject_unwritten(what: str, tool: Any, text: str) -> None:
    """Raise `Unlearnable` if the template omitted a tool or a call, so its name is missing from the text."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = cast("Mapping[str, Any]", inner).get("name") if isinstance(inner, Mapping) else None
    if isinstance(name, str) and name not in text:
        raise Unlearnable(
            f"{what} {name!r}, which the tokenizer's chat template omits; set chat_template to a template that "
            "supports tools."
        )
