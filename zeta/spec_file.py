"""A job spec as a person writes it: YAML 1.2 or JSON, with ``k.l=v`` on top. Names and values are left to the server.

In YAML 1.2 ``1e-4`` is a number and ``no`` a string. What JSON has no word for (dates, sets, keys that are no
strings) is refused here, with its place, except dates, which become the strings that were written.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from zeta_core.contract.errors import InvalidRequest

Spec = dict[str, Any]


def read_spec(file: Path, text: str | None = None) -> Spec:
    """The spec in a file; ``text`` is its content where that comes from elsewhere (standard input).

    Raises `InvalidRequest` naming the file and the line.
    """
    if text is None:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InvalidRequest(f"The spec {file} cannot be read: {reason}.", code="unreadable_spec") from error
    value = _json(file, text) if file.suffix == ".json" else _yaml(str(file), text)
    if not isinstance(value, dict):
        shown = "empty" if value is None else f"a {type(value).__name__}"
        raise InvalidRequest(
            f"The spec {file} is {shown}; it must map field names to values.", code="invalid_spec_file"
        )
    return value


def apply_settings(spec: Spec, settings: list[str]) -> Spec:
    """The spec with each ``k.l=v`` applied: ``v`` is read as YAML 1.2, a number in the path is a place in a list.

    Raises `InvalidRequest` naming the setting.
    """
    changed: Spec = json.loads(json.dumps(spec))
    for setting in settings:
        path, separator, text = setting.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise InvalidRequest(
                f"--set {setting!r} sets nothing; write a field and a value, such as --set lora.r=16.",
                code="invalid_setting",
            )
        _set(changed, keys, _yaml(f"--set {path}", text), setting)
    return changed


def _set(spec: Spec, keys: list[str], value: Any, setting: str) -> None:
    at: Any = spec
    for index, key in enumerate(keys):
        last = index == len(keys) - 1
        if isinstance(at, list):
            if not key.isdecimal() or int(key) >= len(at):
                where = ".".join(keys[:index])
                raise InvalidRequest(
                    f"--set {setting!r}: {where} is a list of {len(at)}; name a place from 0 to {len(at) - 1}.",
                    code="invalid_setting",
                )
            place: Any = int(key)
        elif isinstance(at, dict):
            place = key
        else:
            where = ".".join(keys[:index])
            raise InvalidRequest(
                f"--set {setting!r}: {where} is {at!r}, which has no fields; set {where} itself.",
                code="invalid_setting",
            )
        if last:
            at[place] = value
        else:
            if isinstance(at, dict) and at.get(place) is None:
                at[place] = {}
            at = at[place]


def _json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"{file} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.", code="invalid_spec_file"
        ) from error
    except RecursionError as error:
        raise _endless(str(file)) from error


def _yaml(where: str, text: str) -> Any:
    try:
        value = YAML(typ="safe", pure=True).load(text)  # the C loader speaks YAML 1.1
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise InvalidRequest(f"{where} is not YAML: {error.problem}{place}.", code="invalid_spec_file") from error
    except (YAMLError, ValueError) as error:
        raise InvalidRequest(f"{where} is not YAML: {str(error).splitlines()[0]}.", code="invalid_spec_file") from error
    except RecursionError as error:
        raise _endless(where) from error
    try:
        return _plain(value, where, ())
    except RecursionError as error:  # an alias within the node that it names
        raise _endless(where) from error


def _endless(where: str) -> InvalidRequest:
    return InvalidRequest(f"{where} is nested too deep, or holds itself.", code="invalid_spec_file")


def _plain(value: Any, where: str, path: tuple[str, ...]) -> Any:
    """Only JSON's own types. Raises `InvalidRequest` naming the field of anything else."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                name = ".".join((*path, str(key)))
                raise InvalidRequest(f'{where}: the name {name} must be a string; write it in "quotes".')
        return {key: _plain(item, where, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where, (*path, str(index))) for index, item in enumerate(value)]
    if isinstance(value, date):
        return value.isoformat()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    raise InvalidRequest(f"{where}: {'.'.join(path) or 'the value'} is {value!r}, which JSON has no word for.")
