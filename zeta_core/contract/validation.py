"""From what somebody sent to a model of the contract, or to one error that names every bad field with its cure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec, ZetaError
from zeta_core.contract.other_names import OTHER_NAMES

_TYPE_WORDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
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
}

_LENGTH_WORDS = {
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "of at least {min_length} entries",
    "too_long": "of at most {max_length} entries",
}

NOT_ONE_KIND = "not_one_kind"  # the error of an object that is of none, or of several, of the kinds in its message

ModelT = TypeVar("ModelT", bound=BaseModel)


class Checked(BaseModel):
    """A model with rules between its fields; `parse` tells their faults beside those of single fields."""

    placeholders: ClassVar[dict[str, Any]] = {}  # stand in for required fields that are wrong, so the rules can be held

    def faults(self) -> list[ErrorDetail]:
        return []


def parse(model: type[ModelT], data: object, *, error_class: type[ZetaError] = InvalidSpec) -> ModelT:
    """``data`` as ``model``. Raises ``error_class`` with one `ErrorDetail` for every bad field."""
    if not isinstance(data, Mapping):
        raise InvalidRequest(
            f'The body must be a JSON object, got {shown(data)}. Send the fields as {{"name": value}}.',
            code="invalid_type",
        )
    try:
        parsed = model.model_validate(data)
    except ValidationError as error:
        details = _details(error, data, model)
        if issubclass(model, Checked):
            details += _faults_of_the_rest(model, data, details)
    else:
        details = parsed.faults() if isinstance(parsed, Checked) else []
        if not details:
            return parsed
    raise error_of(details, error_class) from None


def _faults_of_the_rest(model: type[Checked], data: Mapping[Any, Any], bad: list[ErrorDetail]) -> list[ErrorDetail]:
    """The rules between those fields that are right by themselves."""
    wrong = {(detail.param or "").partition(".")[0] for detail in bad}
    rest = {name: value for name, value in data.items() if name not in wrong and name in model.model_fields}
    try:
        parsed = model.model_validate({**model.placeholders, **rest})
    except ValidationError:
        return []
    return [detail for detail in parsed.faults() if (detail.param or "").partition(".")[0] not in wrong]


def error_of(details: list[ErrorDetail], error_class: type[ZetaError] = InvalidSpec) -> ZetaError:
    """One error for a list of faults: the first one's sentence, and how many more there are."""
    first = details[0]
    more = f" ({len(details) - 1} more: see details)" if len(details) > 1 else ""
    return error_class(
        first.message + more,
        code=first.code if len({detail.code for detail in details}) == 1 else error_class.code,
        param=first.param,
        suggestion=first.suggestion,
        details=details,
    )


def nearest(name: str, known: tuple[str, ...]) -> str | None:
    """The field that somebody who wrote ``name`` most likely meant."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return close[0] if close else None


def _meant(path: list[str], model: type[BaseModel]) -> str | None:
    """The whole name of the field that somebody who wrote ``path`` most likely meant: ``lora.rank`` is ``lora.r``."""
    *parents, name = path
    if not parents:
        return nearest(name, _names(model))
    models = [model]
    for part in parents:
        if not part.isdigit():
            fields = (owner.model_fields.get(part) for owner in models)
            models = [inner for field in fields if field is not None for inner in _models_in(field.annotation)]
    place = ".".join(parents)
    if (theirs := OTHER_NAMES.get(name, "")).startswith(f"{place}."):
        return theirs
    close = difflib.get_close_matches(name, {known for inner in models for known in _names(inner)}, n=1, cutoff=0.7)
    return f"{place}.{close[0]}" if close else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation allows, out of its unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _details(error: ValidationError, data: Mapping[Any, Any], model: type[BaseModel]) -> list[ErrorDetail]:
    """One detail for each bad field: what a union says once for each of its members becomes one sentence."""
    details: dict[str, ErrorDetail] = {}
    found = (
        detail
        for fault in error.errors(include_url=False)
        for detail in (
            _kind_details(fault, data, model) if fault["type"] == NOT_ONE_KIND else [_detail(fault, data, model)]
        )
    )
    for detail in found:
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
    return list(details.values())


def _kind_details(fault: Any, data: Mapping[Any, Any], model: type[BaseModel]) -> list[ErrorDetail]:
    """An object that names two kinds is told which; one that names none, which there are, or what its name means."""
    location, value, kinds = _location(fault["loc"], data), fault["input"], fault["msg"].split()
    param = ".".join(location)
    named = [kind for kind in kinds if kind in value]
    if named:
        message = f"{param} has {' and '.join(repr(kind) for kind in named)}; keep one of them."
        return [ErrorDetail(param=param, message=message, code="invalid_value")]
    unknown = [
        ErrorDetail(
            param=f"{param}.{name}",
            message=f"{f'{param}.{name}'!r} is not a known field; did you mean {meant!r}?",
            code="unknown_field",
            suggestion=meant,
        )
        for name in value
        if (meant := _meant([*location, name], model)) is not None and meant != f"{param}.{name}"
    ]
    choice = f"{', '.join(repr(kind) for kind in kinds[:-1])} or {kinds[-1]!r}"
    missing = ErrorDetail(
        param=param, message=f"{param} is {shown(value)}; it must have one of {choice}.", code="missing_field"
    )
    return unknown or [missing]


def _detail(fault: Any, data: Mapping[Any, Any], model: type[BaseModel]) -> ErrorDetail:
    kind, location, value = fault["type"], _location(fault["loc"], data), fault["input"]
    param = ".".join(location) or None
    said = shown(value)
    if kind == "extra_forbidden":
        meant = _meant(location, model)
        cure = f"did you mean {meant!r}?" if meant else "leave it out."
        return ErrorDetail(
            param=param, message=f"{param!r} is not a known field; {cure}", code="unknown_field", suggestion=meant
        )
    if kind == "missing":
        return ErrorDetail(param=param, message=f"{param} is required; add it.", code="missing_field")
    if kind == "string_pattern_mismatch" and (field := _field(location, model)) is not None and field.description:
        return ErrorDetail(
            param=param, message=f"{param} is {said}; it must be {field.description}.", code="invalid_value"
        )
    return value_detail(param, fault)


def value_detail(param: str | None, fault: Any) -> ErrorDetail:
    """What is wrong with the value of ``param``, out of one of pydantic's faults: the value, and what it must be."""
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    said = shown(value)
    if kind == "value_error":
        return ErrorDetail(param=param, message=f"{param} is {said}: {context['error']}.", code="invalid_value")
    for bound, words in (
        ("greater_than_equal", "at least {ge}"),
        ("greater_than", "more than {gt}"),
        ("less_than_equal", "at most {le}"),
        ("less_than", "less than {lt}"),
    ):
        if kind == bound:
            allowed = words.format(**context)
            message = f"{param} is {said}; it must be {allowed}."
            return ErrorDetail(param=param, message=message, code="out_of_range")
    if kind in _LENGTH_WORDS:
        allowed = _LENGTH_WORDS[kind].format(**context)
        return ErrorDetail(param=param, message=f"{param} is {said}; it must be {allowed}.", code="invalid_value")
    if kind in ("literal_error", "enum"):
        expected = context["expected"]
        options = tuple(option.strip("' ") for option in expected.replace(" or ", ", ").split(", "))
        close = difflib.get_close_matches(str(value), options, n=1)
        return ErrorDetail(
            param=param,
            message=f"{param} is {said}; it must be {expected}.",
            code="invalid_value",
            suggestion=close[0] if close else None,
        )
    if kind in _TYPE_WORDS:
        return ErrorDetail(
            param=param, message=f"{param} is {said}; it must be {_TYPE_WORDS[kind]}.", code="invalid_type"
        )
    return ErrorDetail(param=param, message=f"{param} is {said}: {fault['msg']}.", code="invalid_value")


def _field(path: list[str], model: type[BaseModel]) -> FieldInfo | None:
    """The field of that name which ``model`` itself has."""
    return next((field for name, field in model.model_fields.items() if [field.alias or name] == path), None)


def _names(model: type[BaseModel]) -> tuple[str, ...]:
    """The fields of a model by the names that are sent."""
    return tuple(field.alias or name for name, field in model.model_fields.items())


def _location(loc: tuple[Any, ...], data: object) -> list[str]:
    """The path of a fault in what was sent: pydantic's location without the names of union members."""
    path: list[str] = []
    at: object = data
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(at, Mapping) and part in at:
            path.append(_cut(str(part)))
            at = at[part]
        elif isinstance(at, list) and isinstance(part, int) and part < len(at):
            path.append(str(part))
            at = at[part]
        elif last and isinstance(at, Mapping) and isinstance(part, str) and not _is_member_name(part):
            path.append(part)  # a missing field
    return path


def _is_member_name(part: str) -> bool:
    """Whether pydantic put this part there to tell the members of a union apart (see ``spec._tag``)."""
    return "[" in part or part.startswith("<") or part in ("int", "float", "bool", "str")


def shown(value: object) -> str:
    """A value as JSON writes it, cut so that an error never repeats a whole upload."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
