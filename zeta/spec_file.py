"""Reading job specs in YAML 1.2 or JSON, and applying ``field=value`` settings. The server validates the field names.

In YAML 1.2, ``1e-4`` is a number and ``no`` is a string. The result contains only JSON types, and values that the
server accepts (`contract.strict_json`). A file is a single document without duplicate keys. Dates stay strings.
Aliases and merge keys work, up to a limit on their expanded size; other tags are rejected.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from zeta.local_inputs import DATA_FIELDS, source_object
from zeta_core.contract.data_files.file_types import DATA_SUFFIXES, TEXT_SUFFIXES, file_type
from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.printable import printable
from zeta_core.contract.strict_json import (
    BYTE_ORDER_MARK,
    MAX_DEPTH,
    MAX_DIGITS,
    JsonFault,
    check_values,
    decode,
    parse_json,
    too_deep,
)

Spec = dict[str, Any]

MAX_BYTES = 2**24  # the upper limit of the server's ZETA_MAX_SPEC_BYTES
_BEGINNING_BYTES = 4096
MAX_VALUES = 100_000  # after aliases are expanded

_CORE_TAGS = ("null", "bool", "str", "seq", "map")
_TAG = "tag:yaml.org,2002:"


class _Constructor(SafeConstructor):
    """Constructs only JSON types. Scalars outside YAML 1.2's core schema are strings; other tags are errors."""


def _construct_text(_constructor: _Constructor, node: Any) -> str:
    return str(node.value)


def _construct_number(_constructor: _Constructor, node: Any) -> int | float | str:
    """A number of the core schema. Numbers that only YAML 1.1 has (``1_000``, ``1:30``, ``0b1``) are strings."""
    text = str(node.value)
    if re.fullmatch(r"0o[0-7]+|0x[0-9a-fA-F]+", text):
        return int(text, 0)
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text


_known = cast("dict[str | None, Any]", SafeConstructor.yaml_constructors)
_Constructor.yaml_constructors = {
    **{f"{_TAG}{name}": _known[f"{_TAG}{name}"] for name in _CORE_TAGS},
    f"{_TAG}int": _construct_number,
    f"{_TAG}float": _construct_number,
    f"{_TAG}timestamp": _construct_text,
    f"{_TAG}value": _construct_text,  # the plain scalar "="
    None: SafeConstructor.construct_undefined,
}


def read_spec(file: Path, content: bytes | None = None) -> Spec:
    """Read the spec in a file. ``content`` contains the bytes if they come from elsewhere, such as standard input.

    Raises `InvalidRequest` naming the file and the line.
    """
    name = printable(str(file))
    if content is None:
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidRequest(f"The spec {name} cannot be read: {reason}.", code="unreadable_spec") from error
    text = _text(name, content)
    value = _json(name, text) if file.suffix.lower() == ".json" or _is_json(text) else _yaml(name, text)
    if not isinstance(value, dict):
        shown = "empty" if value is None else f"a {_KINDS.get(type(value), 'value')}"
        raise InvalidRequest(
            f"The spec {name} is {shown}; it must map field names to values.", code="invalid_spec_file"
        )
    return cast(Spec, value)


_KINDS = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}


def _text(name: str, content: bytes) -> str:
    """Decode UTF-8. Raises `InvalidRequest` for other encodings."""
    if len(content) > MAX_BYTES:
        raise InvalidRequest(
            f"The spec {name} has more than {MAX_BYTES:,} bytes; refer to data by a path or an id.",
            code="spec_too_large",
        )
    try:
        return decode(content)
    except JsonFault as fault:
        raise InvalidRequest(fault.sentence(f"The spec {name}"), code="unreadable_spec") from fault


def looks_like_data(file: Path) -> bool:
    """Whether a path that is given as a spec is training data.

    A text file may contain a spec, so it is data only if it cannot be read as one; a JSON file is data if it is a list.
    """
    if file.is_dir():
        return True
    kind = file_type(file.name)
    if kind.suffix not in DATA_SUFFIXES or not file.is_file():
        return False
    if kind.compression or kind.suffix not in (*TEXT_SUFFIXES, ".json"):
        return True
    try:
        if kind.suffix == ".json":
            with file.open("rb") as stream:
                return stream.read(_BEGINNING_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        read_spec(file)
    except InvalidRequest:
        return True
    except OSError:  # `read_spec` reports it
        return False
    return False


def apply_settings(spec: Spec, settings: list[str]) -> Spec:
    """The spec with each ``field.subfield=value`` applied. The value is YAML 1.2; a number in the path is a list index.

    Raises `InvalidRequest` naming the setting.
    """
    changed: Spec = json.loads(json.dumps(spec))
    for setting in settings:
        path, separator, text = setting.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not separator or not all(keys):
            raise _invalid_setting(
                f"--set {setting!r} sets nothing; write a field and a value, such as --set lora.r=16."
            )
        try:
            value = _yaml(f"--set {path}", text)
        except InvalidRequest as error:
            message = f"{error.message.rstrip('.')}; put text with special characters in quotes: {path}='\"...\"'."
            raise _invalid_setting(message) from error
        _set(changed, keys, value, setting)
    return changed


def read_grid(options: list[str]) -> dict[str, list[Any]]:
    """The values of each field from ``field=value,value``; the values are items of a YAML 1.2 list.

    Raises `InvalidRequest` naming the option.
    """
    grid: dict[str, list[Any]] = {}
    for option in options:
        name, separator, text = option.partition("=")
        if not separator or not name.strip() or not text.strip():
            raise _invalid_setting(
                f"--grid {option!r} lists no values; write a field and its values, such as learning_rate=1e-4,3e-4."
            )
        if name.strip() in grid:
            raise _invalid_setting(f"--grid lists values of {name.strip()} twice; list all of them in one option.")
        grid[name.strip()] = _yaml(f"--grid {name}", f"[{text}]")
    return grid


def _set(spec: Spec, keys: list[str], value: Any, setting: str) -> None:
    at: Any = spec
    for index, key in enumerate(keys):
        where = ".".join(keys[:index])
        if isinstance(at, list):
            items = cast("list[Any]", at)
            if not _is_index(key) or int(key) >= len(items):
                raise _invalid_setting(f"--set {setting!r}: {_index_error(where, len(items))}.")
            name: Any = int(key)
        elif isinstance(at, dict):
            name = key
        else:
            fix = f"use {where}={{...}} with all of its fields, or set {where} itself"
            raise _invalid_setting(f"--set {setting!r}: can't set a field of {at!r}; {fix}.")
        if index == len(keys) - 1:
            at[name] = value
        else:
            if isinstance(at, dict) and cast(Spec, at).get(key) is None:
                at[name] = {}
            elif (
                isinstance(at[name], str)
                and keys[0] in DATA_FIELDS
                and (index == 0 or (index == 1 and isinstance(at, list)))
            ):
                at[name] = source_object(at[name])  # a source that is written as its name
            at = at[name]


def _index_error(where: str, length: int) -> str:
    if length == 0:
        return f"{where} is an empty list; set {where} itself"
    if length == 1:
        return f"{where} has one item; use the index 0"
    return f"{where} is a list of {length}; use an index from 0 to {length - 1}"


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


def _invalid_setting(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_setting")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _is_json(text: str) -> bool:
    """Whether the text is JSON despite its suffix. A YAML parser would be less strict and much slower."""
    text = text.removeprefix(BYTE_ORDER_MARK)
    if not text.lstrip().startswith("{"):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # JSON that `_json` rejects
        return True
    return True


def _json(name: str, text: str) -> Any:
    try:
        return parse_json(text)
    except JsonFault as fault:
        raise _rejected(name, fault) from fault


# --- YAML -------------------------------------------------------------------------------------------------------------


def _yaml(name: str, text: str) -> Any:
    text = text.removeprefix(BYTE_ORDER_MARK)
    version = re.search(r"^%YAML\s+(\S+)", text, re.MULTILINE)
    if version is not None and version[1] != "1.2":
        raise _invalid(f"{name} declares YAML {version[1]}; specs are YAML 1.2, remove the %YAML line.")
    parser = YAML(typ="safe", pure=True)  # the C loader reads YAML 1.1
    parser.Constructor = _Constructor
    try:
        node: Node | None = parser.compose(text)
        if node is None:
            return None
        _check_size(node, name)
        value: Any = parser.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise _invalid(f"{name} is not valid YAML: {_problem(error)}{position}.") from error
    except (YAMLError, ValueError) as error:
        reason = printable(str(error).splitlines()[0])
        raise _invalid(f"{name} is not valid YAML: {reason}.") from error
    except RecursionError as error:
        raise _too_deep(name) from error
    value = _json_types(value, name)
    try:
        check_values(value)
    except JsonFault as fault:
        raise _rejected(name, fault) from fault
    return value


def _problem(error: MarkedYAMLError) -> str:
    problem = printable(str(error.problem))
    if "expected a single document" in str(error.context):
        return "it has several documents (---), but a file describes one job; a second document starts"
    tag = re.search(r"constructor for the tag '([^']*)'", problem)
    if tag is not None:
        return f"the tag {tag[1].replace(_TAG, '!!')} is not supported in a spec"
    return problem


def _check_size(root: Node, name: str) -> None:
    """Reject a document that is nested too deeply, contains itself, or expands to too many values."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def expanded_size(node: Node, depth: int) -> int:
        key = id(node)
        if key in sizes:
            return sizes[key]
        if key in open_nodes:
            raise _invalid(f"{name} is not valid YAML: an alias refers to a value that contains it.")
        if depth > MAX_DEPTH:
            raise _too_deep(name)
        if isinstance(node, ScalarNode):
            if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(str(node.value)) > MAX_DIGITS:
                mark = node.start_mark
                raise _invalid(
                    f"{name}: the number in line {mark.line + 1} has more than {MAX_DIGITS} digits, which is too large."
                )
            return 1
        open_nodes.add(key)
        children: list[Node] = []
        if isinstance(node, MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            children = list(node.value)
        sizes[key] = 1 + sum(expanded_size(child, depth + 1) for child in children)
        open_nodes.discard(key)
        return sizes[key]

    if expanded_size(root, 0) > MAX_VALUES:
        raise _invalid(f"{name} has more than {MAX_VALUES:,} values after its aliases are expanded; reduce them.")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_spec_file")


def _rejected(name: str, fault: JsonFault) -> InvalidRequest:
    return InvalidRequest(fault.sentence(name), code="invalid_spec_file", param=fault.param)


def _too_deep(name: str) -> InvalidRequest:
    return _rejected(name, too_deep(MAX_DEPTH))


def _json_types(value: Any, name: str, path: tuple[str, ...] = ()) -> Any:
    """The value with only JSON types. Raises `InvalidRequest` naming the field of any other value."""
    if isinstance(value, dict):
        fields = cast("dict[Any, Any]", value)
        for key in fields:
            if not isinstance(key, str):
                field = ".".join((*path, str(key)))
                raise _invalid(f'{name}: the key {field} must be a string; write it in "quotes".')
        return {key: _json_types(item, name, (*path, key)) for key, item in fields.items()}
    if isinstance(value, list):
        items = cast("list[Any]", value)
        return [_json_types(item, name, (*path, str(index))) for index, item in enumerate(items)]
    field = ".".join(path) or "the value"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_DIGITS:
        raise _invalid(f"{name}: {field} is a number of more than {MAX_DIGITS} digits, which is too large.")
    if value is None or isinstance(value, bool | int | str | float):
        return value
    raise _invalid(f"{name}: {field} is {value!r}, which JSON cannot express.")
