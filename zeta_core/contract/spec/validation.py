"""From what somebody sent to a model of the contract, or to one error that names every bad field with its cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from zeta_core.contract.errors import ErrorDetail, InvalidRequest, InvalidSpec, ZetaError
from zeta_core.contract.spec.other_names import OTHER_NAMES

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

# One answer names so many faults and counts the rest; a request may contain thousands.
MAX_DETAILS = 50
# Similar names are searched for the first faults only, and for names about as long as those of fields.
MAX_SUGGESTIONS = 10
MAX_NAME_LENGTH = 60
MAX_SHOWN = 80  # characters of a value that an error repeats

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
    num_more = 0
    try:
        parsed = model.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        details, num_more = _details(faults, data, model)
        if issubclass(model, Checked):
            details += _faults_of_the_rest(model, data, {str(fault["loc"][0]) for fault in faults if fault["loc"]})
    else:
        details = parsed.faults() if isinstance(parsed, Checked) else []
        if not details:
            return parsed
    raise error_of(details, error_class, num_more=num_more) from None


def _faults_of_the_rest(model: type[Checked], data: Mapping[Any, Any], wrong: set[str]) -> list[ErrorDetail]:
    """The rules between those fields that are right by themselves."""
    rest = {name: value for name, value in data.items() if name not in wrong and name in model.model_fields}
    try:
        parsed = model.model_validate({**model.placeholders, **rest})
    except ValidationError:
        return []
    return [detail for detail in parsed.faults() if (detail.param or "").partition(".")[0] not in wrong]


def error_of(
    details: Sequence[ErrorDetail], error_class: type[ZetaError] = InvalidSpec, *, num_more: int = 0
) -> ZetaError:
    """One error for a list of faults: the first one's sentence, and the number of the others.

    It lists up to `MAX_DETAILS` of them; ``num_more`` faults were found beside ``details``.
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


def nearest(name: str, known: Sequence[str], *, search: bool = True) -> str | None:
    """The field that somebody who wrote ``name`` most likely meant; without ``search`` only by its other names."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    return closest(name, known, cutoff=0.7) if search else None


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The most similar of the ``known`` names; none for a name that is much longer than theirs."""
    if len(name) > MAX_NAME_LENGTH:
        return None
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def _meant(path: list[str], model: type[BaseModel], *, search: bool = True) -> str | None:
    """The whole name of the field that somebody who wrote ``path`` most likely meant: ``lora.rank`` is ``lora.r``."""
    *parents, name = path
    if not parents:
        return nearest(name, _names(model), search=search)
    place = ".".join(parents)
    if (theirs := OTHER_NAMES.get(name, "")).startswith(f"{place}."):
        return theirs
    if not search:
        return None
    models = [model]
    for part in parents:
        if not part.isdigit():
            fields = (owner.model_fields.get(part) for owner in models)
            models = [inner for field in fields if field is not None for inner in _models_in(field.annotation)]
    close = closest(name, {known for inner in models for known in _names(inner)}, cutoff=0.7)
    return f"{place}.{close}" if close else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation allows, out of its unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _details(faults: Sequence[Any], data: Mapping[Any, Any], model: type[BaseModel]) -> tuple[list[ErrorDetail], int]:
    """One detail for each bad field, and the number of faults beyond `MAX_DETAILS` fields.

    What a union reports once for each of its members becomes one sentence.
    """
    details: dict[str, ErrorDetail] = {}
    for index, fault in enumerate(faults):
        if len(details) >= MAX_DETAILS:
            return list(details.values()), len({other["loc"] for other in faults[index:]})
        search = len(details) < MAX_SUGGESTIONS
        for detail in _of_one_fault(fault, data, model, search=search):
            _add(details, detail)
    return list(details.values()), 0


def _of_one_fault(fault: Any, data: Mapping[Any, Any], model: type[BaseModel], *, search: bool) -> list[ErrorDetail]:
    if fault["type"] == NOT_ONE_KIND:
        return _kind_details(fault, data, model)
    return [_detail(fault, data, model, search=search)]


def _add(details: dict[str, ErrorDetail], detail: ErrorDetail) -> None:
    """Add the detail of a field, or what another member of a union allows to the field's earlier one."""
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
        for name in islice(value, MAX_SUGGESTIONS)
        if (meant := _meant([*location, name], model)) is not None and meant != f"{param}.{name}"
    ]
    choice = f"{', '.join(repr(kind) for kind in kinds[:-1])} or {kinds[-1]!r}"
    missing = ErrorDetail(
        param=param, message=f"{param} is {shown(value)}; it must have one of {choice}.", code="missing_field"
    )
    return unknown or [missing]


def _detail(fault: Any, data: Mapping[Any, Any], model: type[BaseModel], *, search: bool) -> ErrorDetail:
    kind, location = fault["type"], _location(fault["loc"], data)
    param = ".".join(location) or None
    if kind == "extra_forbidden":
        meant = _meant(location, model, search=search)
        cure = f"did you mean {meant!r}?" if meant else "leave it out."
        return ErrorDetail(
            param=param, message=f"{param!r} is not a known field; {cure}", code="unknown_field", suggestion=meant
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
        return ErrorDetail(
            param=param,
            message=f"{param} is {said}; it must be {expected}.",
            code="invalid_value",
            suggestion=closest(value, options) if isinstance(value, str) else None,
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
            path.append(cut(str(part)))
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
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > MAX_SHOWN:
            break
    return cut(text)


def _pieces(value: object) -> Iterator[str]:
    """``repr(value)`` in pieces, so that only the beginning of a large value is ever written."""
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
    """The beginning of a text that is too long to be repeated."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
