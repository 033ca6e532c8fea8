"""Reading the turns of a conversation, in every accepted form, as the messages that chat templates expect.

Accepted forms: messages with ``role`` and ``content`` as in OpenAI's API, including text parts, refusals, ``developer``
turns and the older ``function_call`` and ``function`` role; and ShareGPT's ``from`` and ``value``. Fields that no form
defines are kept, so that `zeta_core.data.documents.coverage` can report those that the chat template ignores.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, cast

from zeta_core.data.rows.row import describe_type

Message = dict[str, Any]

# The roles of chat templates, by the names that data uses for them. The names that are not OpenAI's come from ShareGPT
# and from LLaMA-Factory's ShareGPT reader. A `function_call` is an assistant turn whose content is the call.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # the fields for the reasoning that precedes an answer
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_SHOWN = "system, user, assistant, tool (ShareGPT: human, gpt)"


class InvalidTurn(Exception):
    """A turn that cannot be read. The message completes a sentence that starts with the location of the turn."""


def read_turn(turn: object, drop: Collection[str] = ()) -> Message:
    """Read a turn as a message, without empty fields and the fields named in ``drop``. Raises `InvalidTurn`."""
    if not isinstance(turn, Mapping):
        raise InvalidTurn("is not an object with 'role' and 'content'.")
    given = cast("Mapping[str, Any]", turn)
    fields = {name: value for name, value in given.items() if value is not None and name not in drop}
    role = fields.pop("role", None) or fields.pop("from", None)
    content = fields.pop("content", fields.pop("value", None) if "content" not in fields else None)
    if role is None:
        raise InvalidTurn(f"has no 'role' (it has: {', '.join(sorted(map(str, given))[:8]) or 'none'}).")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidTurn(f"has the role {str(role)[:40]!r}; use {_SHOWN}.")
    message: Message = {"role": ROLES[role], **_read_content(content)}
    _add_reasoning(message, fields)
    if role == "function_call":
        message["tool_calls"] = _calls_in_text(message["content"])
        message["content"] = ""
    elif calls := _read_calls(fields):
        message["tool_calls"] = calls
    if message.get("refusal") is None and fields.get("refusal"):
        message["refusal"] = fields["refusal"]
    if not message["content"] and isinstance(message.get("refusal"), str):
        message["content"] = message.pop("refusal")  # the assistant's answer is its refusal
    _check_weight(message["role"], fields)
    rest = {name: value for name, value in fields.items() if name not in ("tool_calls", "function_call", "refusal")}
    message |= {name: value for name, value in rest.items() if value not in ("", [], {})}
    _check_content(message, content)
    return message


def is_turn(value: object, *, is_expected: bool) -> bool:
    """Whether a value looks like a turn. If turns are not expected here, its role must be a known one."""
    if not isinstance(value, Mapping):
        return False
    fields = cast("Mapping[str, Any]", value)
    role = fields.get("from") if "value" in fields else fields.get("role")
    return isinstance(role, str) and (is_expected or (role in ROLES and ("value" in fields or "content" in fields)))


def read_tools(tools: object, functions: object = None) -> list[dict[str, Any]] | None:
    """Read the tools of a row in the form that chat templates expect. Raises `InvalidTurn`.

    They are a list of objects, or the same as JSON text, because a table has no other way to store it. ``functions`` is
    OpenAI's older name for tools.
    """
    objects = [*_list_of_objects("tools", tools), *_list_of_objects("functions", functions)]
    return [_wrapped(tool) for tool in objects] or None


def _wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as ``{"type": "function", "function": {...}}``, the form that transformers documents for templates."""
    if "name" in tool and "function" not in tool and "type" not in tool:
        return {"type": "function", "function": dict(tool)}
    return dict(tool)


def _list_of_objects(name: str, value: object) -> list[Mapping[str, Any]]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise InvalidTurn(f"{name!r} is text that is not JSON.") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in cast("list[object]", value)):
        given = "a list with other values" if isinstance(value, list) else describe_type(value)
        raise InvalidTurn(f"{name!r} is {given}; provide a list of objects.")
    return cast("list[Mapping[str, Any]]", value)


# --- Fields of a turn -------------------------------------------------------------------------------------------------


def _read_content(content: object) -> Message:
    """The content as text, and the refusal and reasoning that its parts contain."""
    if content is None:
        return {"content": ""}
    if isinstance(content, str):
        return {"content": content}
    if not isinstance(content, list):
        raise InvalidTurn(f"has 'content' that is {describe_type(content)}, not text.")
    texts: dict[str, list[str]] = {"text": [], "refusal": [], "thinking": []}
    for part in cast("list[object]", content):
        fields = cast("Mapping[str, Any]", part) if isinstance(part, Mapping) else {}
        kind = fields.get("type", "text" if isinstance(fields.get("text"), str) else "unknown")
        name = "thinking" if kind == "thinking" else _TEXT_PARTS.get(str(kind))
        value = fields.get(name) if name is not None else None
        if name is None or not isinstance(value, str):
            raise InvalidTurn(
                f"has a part of 'content' that is not text (type {str(kind)[:40]!r}); only text can be trained on, so "
                "remove the part, or the row."
            )
        texts[name].append(value)
    message: Message = {"content": "".join(texts["text"])}
    return message | {name: "".join(texts[name]) for name in ("refusal", "thinking") if texts[name]}


def _add_reasoning(message: Message, fields: Message) -> None:
    if "thinking" in message and any(fields.get(name) for name in REASONING):
        raise InvalidTurn("has reasoning both in a part of 'content' and in a field; provide it once.")
    for name in REASONING:
        if fields.get(name) and not isinstance(fields[name], str):
            raise InvalidTurn(f"has {name!r} that is {describe_type(fields[name])}, not text.")


def _read_calls(fields: Message) -> list[Any]:
    calls, older = fields.get("tool_calls"), fields.get("function_call")
    if calls and older:
        raise InvalidTurn("has both 'tool_calls' and 'function_call'; provide the call once.")
    if older:
        calls = [{"type": "function", "function": older}]
    if isinstance(calls, str):
        calls = _json("'tool_calls'", calls)
    if calls is not None and not isinstance(calls, list):
        raise InvalidTurn(f"has 'tool_calls' that is {describe_type(calls)}; provide a list.")
    return [_read_call(call) for call in cast("list[object]", calls or [])]


def _calls_in_text(content: str) -> list[Any]:
    """The calls of a ``function_call`` turn, whose content is a call, or a list of calls, as JSON."""
    calls = _json("'function_call'", content)
    several = cast("list[object]", calls) if isinstance(calls, list) else [calls]
    return [_read_call({"type": "function", "function": call}) for call in several]


def _read_call(call: object) -> Any:
    """A tool call with its arguments as an object, parsed if they are JSON text as in OpenAI's API."""
    fields = cast("Mapping[str, Any]", call) if isinstance(call, Mapping) else {}
    read = {name: value for name, value in fields.items() if value is not None}
    inner = read.get("function", read)
    if not isinstance(inner, Mapping) or not isinstance(cast("Mapping[str, Any]", inner).get("name"), str):
        raise InvalidTurn('has a tool call without a name; use {"function": {"name": "...", "arguments": {...}}}.')
    function = dict(cast("Mapping[str, Any]", inner))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function["arguments"] = _json("a tool call with arguments", arguments) if arguments.strip() else {}
    return {**read, "function": function} if "function" in read else function


def _json(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise InvalidTurn(f"has {what} that is not valid JSON.") from None


def _check_weight(role: str, fields: Message) -> None:
    weight = fields.get("weight")
    if weight not in (None, 0, 1):
        raise InvalidTurn(f"has the weight {str(weight)[:40]}; use 0 for a turn that is not trained on, or 1.")
    if weight and role != "assistant":
        raise InvalidTurn("has the weight 1, but only assistant turns are trained on; remove it.")


def _check_content(message: Message, content: object) -> None:
    if "audio" in message:
        raise InvalidTurn("has 'audio'; only text can be trained on, so remove the field, or the row.")
    if content is None and not (message["content"] or message.keys() & {"tool_calls", *REASONING}):
        raise InvalidTurn("has neither 'content' nor 'tool_calls'.")
