"""A spec as YAML 1.2, for the pages: written for people, and read as strictly as a JSON body.

Guarantees: an alias is rejected, so a short text can't stand for a large value, tags and deep nesting are rejected, and
what was read obeys the rules of `contract.strict_json`. Reading 64 KiB takes a second, so it belongs in a thread.
"""

from __future__ import annotations

import io
import json
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from zeta_core.contract.errors import InvalidRequest, TooLarge
from zeta_core.contract.strict_json import MAX_DEPTH, JsonFault, read_json


def write_yaml(spec: dict[str, Any]) -> str:
    """The spec as YAML, with its fields in the given order."""
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
    """Reject aliases, tags and deep nesting, which takes the parser minutes. Raises `InvalidRequest` or `YAMLError`."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _invalid(f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, AliasEvent):
            raise _invalid("contains an alias (*name); write the value itself")
        if getattr(event, "tag", None) is not None:  # it selects a constructor of the library
            raise _invalid("contains a tag (!name); write plain values")


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The YAML {reason}.", code="invalid_yaml", param="yaml")
