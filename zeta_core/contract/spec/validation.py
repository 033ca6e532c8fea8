"""Parses a request body into a model of the contract, or raises one error with every invalid field and its fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec, ZetaError
from zeta_core.contract.spec.other_names import OTHER_NAMES

_TYPE_DESCRIPTIONS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number with fewer digits",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
    "datetime_type": "a time such as '2030-01-31T12:00:00Z'",
    "datetime_parsing": "a time such as '2030-01-31T12:00:00Z'",
    "datetime_from_date_parsing": "a time such as '2030-01-31T12:00:00Z'",
    "timezone_aware": "a time with its offset, such as '2030-01-31T12:00:00Z'",
    "byte_size": "a number of bytes, or text such as '80GB'",
    "byte_size_unit": "a number of bytes, or text such as '80GB'",
}

_LENGTH_DESCRIPTIONS = {
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "of at least {min_length} entries",
    "too_long": "of at most {max_length} entries",
}

# A response lists this many invalid fields and counts the rest; a request may contain thousands.
MAX_DETAILS = 50
# Only the first invalid fields get a suggestion, and only if their names are about as long as those of fields.
MAX_SUGGESTIONS = 10
MAX_NAME_LENGTH = 60
MAX_SHOWN = 80  # characters of a value that an error repeats

NOT_ONE_KIND = "not_one_kind"  # error type of an object that has none or several of the kinds in its message

ModelT = TypeVar("ModelT", bound=BaseModel)


class StrictModel(BaseModel):
    """A part of a request: frozen, without unknown fields or conversion of JSON types ("3" is not 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelWithRules(BaseModel):
    """A model with rules between its fields, which `parse` checks, too."""

    # They replace invalid required fields, so that the rules between the other fields can be checked.
    placeholders: ClassVar[dict[str, Any]] = {}

    def faults(self) -> list[ErrorDetail]:
        """One detail for every broken rule."""
        return []


def parse(
    model: type[ModelT], body: object, *, error_class: type[ZetaError] = InvalidSpec, is_text: bool = False
) -> ModelT:
    """``body`` as ``model``. Raises ``error_class`` with one `ErrorDetail` for every invalid field.

    ``is_text``: all values are texts, because the body is a form; they are converted to the types of the fields.
    """
    if not isinstance(body, Mapping):
        raise InvalidRequest(
            f'The body must be a JSON object, got {shown(body)}. Send the fields as {{"name": value}}.',
            code="invalid_type",
        )
    num_more = 0
    try:
        parsed = _validated(model, body, is_text=is_text)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        details, num_more = _details(faults, body, model)
        if issubclass(model, ModelWithRules):
            wrong = {str(fault["loc"][0]) for fault in faults if fault["loc"]}
            details += _faults_of_the_rest(model, body, wrong, is_text=is_text)
    else:
        details = parsed.faults() if isinstance(parsed, ModelWithRules) else []
        if not details:
            return parsed
    raise error_from_details(details, error_class, num_more=num_more) from None


def _validated(model: type[ModelT], body: Mapping[Any, Any], *, is_text: bool) -> ModelT:
    """Raises `ValidationError`."""
    return model.model_validate(body, strict=False) if is_text else model.model_validate(body)


def _faults_of_the_rest(
    model: type[ModelWithRules], body: Mapping[Any, Any], wrong: set[str], *, is_text: bool
) -> list[ErrorDetail]:
    """The rules between the valid fields."""
    rest = {name: value for name, value in body.items() if name not in wrong and name in model.model_fields}
    try:
        parsed = _validated(model, {**model.placeholders, **rest}, is_text=is_text)
    except ValidationError:
        return []
    return [detail for detail in parsed.faults() if (detail.param or "").partition(".")[0] not in wrong]


def error_from_details(
    details: Sequence[ErrorDetail], error_class: type[ZetaError] = InvalidSpec, *, num_more: int = 0
) -> ZetaError:
    """One error with the message of the first detail and the number of the others.

    It lists up to `MAX_DETAILS` of them; ``num_more`` faults are not in ``details``.
    """
    first, listed = details[0], details[:MAX_DETAILS]
    others = len(details) - 1 + num_more
    first_listed = f"; the first {len(listed)} are listed" if len(listed) <= others else ""
    more = f" ({others} more: see details{first_listed})" if others else ""
    return error_class(
        first.message + more,
        code=first.code if len({detail.code for detail in listed}) == 1 else error_class.code,
        param=first.param,
        suggestion=first.suggestion,
        details=listed,
    )


def nearest(name: str, names: Sequence[str], *, search: bool = True) -> str | None:
    """The field that ``name`` most likely stands for; without ``search``, only for names of other trainers."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    return closest(name, names, cutoff=0.7) if search else None


def closest(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The most similar of the ``names``, if any is similar; None for a name that is much longer."""
    if len(name) > MAX_NAME_LENGTH:
        return None
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def _suggestion(path: list[str], model: type[BaseModel], *, search: bool = True) -> str | None:
    """The full name of the field that ``path`` most likely stands for, such as ``lora.r`` for ``lora.rank``."""
    *parents, name = path
    if not parents:
        return nearest(name, _names(model), search=search)
    parent = ".".join(parents)
    if (field_name := OTHER_NAMES.get(name, "")).startswith(f"{parent}."):
        return field_name
    if not search:
        return None
    models = [model]
    for part in parents:
        if not part.isdigit():
            fields = (owner.model_fields.get(part) for owner in models)
            models = [inner for field in fields if field is not None for inner in _models_in(field.annotation)]
    close = closest(name, {field_name for inner in models for field_name in _names(inner)}, cutoff=0.7)
    return f"{parent}.{close}" if close else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models in a field's annotation, including those in unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _details(faults: Sequence[Any], body: Mapping[Any, Any], model: type[BaseModel]) -> tuple[list[ErrorDetail], int]:
    """One detail for each invalid field, and the number of faults beyond `MAX_DETAILS` fields.

    The errors that a union reports for each of its members are merged into one sentence.
    """
    details: dict[str, ErrorDetail] = {}
    for index, fault in enumerate(faults):
        if len(details) >= MAX_DETAILS:
            return list(details.values()), len({other["loc"] for other in faults[index:]})
        search = len(details) < MAX_SUGGESTIONS
        for detail in _error_details(fault, body, model, search=search):
            _add(details, detail)
    return list(details.values()), 0


def _error_details(fault: Any, body: Mapping[Any, Any], model: type[BaseModel], *, search: bool) -> list[ErrorDetail]:
    if fault["type"] == NOT_ONE_KIND:
        return _kind_details(fault, body, model)
    return [_detail(fault, body, model, search=search)]


def _add(details: dict[str, ErrorDetail], detail: ErrorDetail) -> None:
    """Add a detail, or merge it with the field's earlier one: each member of a union reports what it allows."""
    key = detail.param or detail.message
    earlier = details.get(key)
    if earlier is not None and "; it must be " in earlier.message and "; it must be " in detail.message:
        allowed = detail.message.split("; it must be ")[1]
        if allowed.removesuffix(".") not in earlier.message:
            message = f"{earlier.message.removesuffix('.')}, or {allowed}"
            detail = earlier.model_copy(update={"message": message})
        else:
            detail = earlier
    elif earlier is not None:
        detail = earlier
    details[key] = detail


def _kind_details(fault: Any, body: Mapping[Any, Any], model: type[BaseModel]) -> list[ErrorDetail]:
    """For an object with several kinds, name them; for one without a kind, suggest a field or list the kinds."""
    location, value, kinds = _location(fault["loc"], body), fault["input"], fault["msg"].split()
    param = ".".join(location)
    given_kinds = [kind for kind in kinds if kind in value]
    if given_kinds:
        message = f"{param} has {' and '.join(repr(kind) for kind in given_kinds)}; keep one of them."
        return [ErrorDetail(param=param, message=message, code="invalid_value")]
    unknown = [
        ErrorDetail(
            param=f"{param}.{name}",
            message=f"{f'{param}.{name}'!r} is not a known field; did you mean {suggestion!r}?",
            code="unknown_field",
            suggestion=suggestion,
        )
        for name in islice(value, MAX_SUGGESTIONS)
        if (suggestion := _suggestion([*location, name], model)) is not None and suggestion != f"{param}.{name}"
    ]
    choice = f"{', '.join(repr(kind) for kind in kinds[:-1])} or {kinds[-1]!r}"
    missing = ErrorDetail(
        param=param, message=f"{param} is {shown(value)}; it must have one of {choice}.", code="missing_field"
    )
    return unknown or [missing]


def _detail(fault: Any, body: Mapping[Any, Any], model: type[BaseModel], *, search: bool) -> ErrorDetail:
    kind, location = fault["type"], _location(fault["loc"], body)
    param = ".".join(location) or None
    if kind == "extra_forbidden":
        suggestion = _suggestion(location, model, search=search)
        fix = f"did you mean {suggestion!r}?" if suggestion else "omit it."
        return ErrorDetail(
            param=param, message=f"{param!r} is not a known field; {fix}", code="unknown_field", suggestion=suggestion
        )
    if kind == "missing":
        return ErrorDetail(param=param, message=f"{param} is required; add it.", code="missing_field")
    if kind == "string_pattern_mismatch" and (field := _field(location, model)) is not None and field.description:
        return ErrorDetail(
            param=param,
            message=f"{param} is {shown(fault['input'])}; it must be {field.description}.",
            code="invalid_value",
        )
    return value_detail(param, fault)


def invalid_value(param: str, value: object, fix: str) -> ErrorDetail:
    """The detail for a valid value of ``param`` that can't be used in this request; ``fix`` explains why."""
    return ErrorDetail(param=param, message=f"{param} is {shown(value)}; {fix}.", code="invalid_value")


def value_detail(param: str | None, fault: Any) -> ErrorDetail:
    """The detail for an invalid value of ``param``, from an error of pydantic: the value, and what it must be."""
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    text = shown(value)
    if kind == "value_error":
        return ErrorDetail(param=param, message=f"{param} is {text}: {context['error']}.", code="invalid_value")
    for bound, words in (
        ("greater_than_equal", "at least {ge}"),
        ("greater_than", "more than {gt}"),
        ("less_than_equal", "at most {le}"),
        ("less_than", "less than {lt}"),
    ):
        if kind == bound:
            allowed = words.format(**context)
            message = f"{param} is {text}; it must be {allowed}."
            return ErrorDetail(param=param, message=message, code="out_of_range")
    if kind in _LENGTH_DESCRIPTIONS:
        allowed = _LENGTH_DESCRIPTIONS[kind].format(**context)
        return ErrorDetail(param=param, message=f"{param} is {text}; it must be {allowed}.", code="invalid_value")
    if kind in ("literal_error", "enum"):
        expected = context["expected"]
        options = tuple(option.strip("' ") for option in expected.replace(" or ", ", ").split(", "))
        return ErrorDetail(
            param=param,
            message=f"{param} is {text}; it must be {expected}.",
            code="invalid_value",
            suggestion=closest(value, options) if isinstance(value, str) else None,
        )
    if kind in _TYPE_DESCRIPTIONS:
        return ErrorDetail(
            param=param, message=f"{param} is {text}; it must be {_TYPE_DESCRIPTIONS[kind]}.", code="invalid_type"
        )
    return ErrorDetail(param=param, message=f"{param} is {text}: {fault['msg']}.", code="invalid_value")


def _field(path: list[str], model: type[BaseModel]) -> FieldInfo | None:
    """The top-level field of ``model`` with this path, if it has one."""
    return next((field for name, field in model.model_fields.items() if [field.alias or name] == path), None)


def _names(model: type[BaseModel]) -> tuple[str, ...]:
    """The names of a model's fields in requests."""
    return tuple(field.alias or name for name, field in model.model_fields.items())


def _location(loc: tuple[Any, ...], body: object) -> list[str]:
    """The path of a fault in the body: pydantic's location without the names of union members."""
    path: list[str] = []
    current: object = body
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(current, Mapping) and part in current:
            path.append(cut(str(part)))
            current = current[part]
        elif isinstance(current, list) and isinstance(part, int) and part < len(current):
            path.append(str(part))
            current = current[part]
        elif last and isinstance(current, Mapping) and isinstance(part, str) and not _is_member_name(part):
            path.append(part)  # a missing field
    return path


def _is_member_name(part: str) -> bool:
    """Whether this part of a location is the name of a union's member (see ``sources._tag``) instead of a field."""
    return "[" in part or part.startswith("<") or part in ("int", "float", "bool", "str")


def shown(value: object) -> str:
    """A value as text for a message, truncated to `MAX_SHOWN` characters."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > MAX_SHOWN:
            break
    return cut(text)


def _pieces(value: object) -> Iterator[str]:
    """``repr(value)`` in pieces, so that only the beginning of a large value is formatted."""
    if isinstance(value, str):
        yield repr(value[: MAX_SHOWN + 1])
    elif isinstance(value, dict):
        yield "{"
        for index, (name, item) in enumerate(value.items()):
            yield ", " if index else ""
            yield from _pieces(name)
            yield ": "
            yield from _pieces(item)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _pieces(item)
        yield "]"
    else:
        yield repr(value)


def cut(text: str) -> str:
    """The text, truncated to `MAX_SHOWN` characters."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
