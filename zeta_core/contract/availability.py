"""Which words of the contract are not built yet: refused by name, never accepted and ignored.

An entry goes when its work is done; the spec itself already knows every field, so nothing else changes then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.validation import shown

Refusal = Callable[[Any], bool]


def _given(value: Any) -> bool:
    return value is not None and value is not False and value != []


def _other_than(*allowed: Any) -> Refusal:
    return lambda value: value not in allowed


NOT_AVAILABLE_YET: dict[str, tuple[Refusal, str]] = {
    "method": (_other_than("sft"), "use 'sft'"),
    "dpo": (_given, "leave it out"),
}


def faults(options: BaseModel) -> list[ErrorDetail]:
    """One detail (code ``not_available_yet``) for every field that asks for what is not built yet."""
    details = [
        _detail(name, getattr(options, name), cure)
        for name, (refused, cure) in NOT_AVAILABLE_YET.items()
        if hasattr(options, name) and refused(getattr(options, name))
    ]
    dataset = getattr(options, "dataset", None)
    sources = dataset if isinstance(dataset, list) else [dataset]
    for source in sources:
        if source is not None and source.format == "preference":
            details.append(_detail("dataset.format", source.format, "use conversations or text"))
        if source is not None and source.weight is not None:
            details.append(_detail("dataset.weight", source.weight, "leave it out; sources follow one another"))
    resources = getattr(options, "resources", None)
    for name in ("nodes", "gpus"):
        value = getattr(resources, name, None)
        if value is not None and value > 1:
            details.append(_detail(f"resources.{name}", value, "use 1"))
    return details


def _detail(param: str, value: object, cure: str) -> ErrorDetail:
    message = f"{param} is {shown(value)}, which is not available yet; {cure}."
    return ErrorDetail(param=param, message=message, code="not_available_yet")
