"""A spec as YAML 1.2, for the pages: written for people, and read as strictly as a JSON body.

Guarantees: an alias is rejected, so a short text can't stand for a large value; tags, deep nesting and more than
`MAX_VALUES` values are rejected; what was read obeys the rules of `contract.strict_json`. Reading or writing the
largest spec takes up to 0.3 s, so it belongs in a thread.
"""

from __future__ import annotations

import io
import json
from itertools import chain
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

from zeta_core.contract.errors import InvalidRequest, TooLarge
from zeta_core.contract.strict_json import MAX_DEPTH, JsonFault, read_json

MAX_VALUES = 5000  # with names and containers; the library takes 20 microseconds to read each, and 60 to write it


def write_yaml(spec: dict[str, Any]) -> str:
    """The spec as YAML, with its fields in order. Raises `InvalidRequest` for more than `MAX_VALUES` values."""
    if _has_more_values(spec, MAX_VALUES):
        raise _too_many()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 100
    text = io.StringIO()
    yaml.dump(spec, text)
    return text.getvalue() if spec else ""


def read_yaml(text: str, max_bytes: int) -> dict[str, Any]:
    """The spec in a YAML text. Raises `InvalidRequest` with the line of the fault, and `TooLarge`."""
    if len(text.encode()) > max_bytes:
        raise TooLarge(f"The spec is larger than the limit of {max_bytes} bytes; refer to data by a file's id.")
    try:
        _check_events(text)
        value = YAML(typ="safe", pure=True).load(text)
        value = read_json(json.dumps(value, allow_nan=False).encode())
    except MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise _invalid(f"can't be read{line}: {error.problem or error}") from error
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise _invalid("contains a value that JSON can't represent, or that is nested too deeply") from error
    except JsonFault as fault:
        raise _invalid(f"is rejected: {fault.subject or 'it'} {fault.reason}") from fault
    if not isinstance(value, dict):
        raise _invalid("must map names of fields to values, such as 'max_steps: 100'")
    return cast("dict[str, Any]", value)


def _check_events(text: str) -> None:
    """Reject what would take long to load, aliases and tags. Raises `InvalidRequest` or `YAMLError`."""
    depth = num_values = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        num_values += isinstance(event, NodeEvent)
        if num_values > MAX_VALUES:
            raise _too_many()
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _invalid(f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, AliasEvent):
            raise _invalid("contains an alias (*name); write the value itself")
        if getattr(event, "tag", None) is not None:  # it selects a constructor of the library
            raise _invalid("contains a tag (!name); write plain values")


def _has_more_values(value: Any, limit: int) -> bool:
    """Whether a JSON value contains more than ``limit`` values, names and containers."""
    unseen, num_values = [value], 0
    while unseen and num_values <= limit:
        num_values += 1
        match unseen.pop():
            case dict() as fields:
                unseen += chain.from_iterable(cast("dict[str, Any]", fields).items())
            case list() as values:
                unseen += cast("list[Any]", values)
            case _:
                pass
    return num_values > limit


def _too_many() -> InvalidRequest:
    return _invalid(f"would have more than {MAX_VALUES} values; submit such a spec with `zeta submit` or POST /v1/jobs")


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The YAML {reason}.", code="invalid_yaml", param="yaml")
