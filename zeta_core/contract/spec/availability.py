"""Fields of the contract that are not implemented yet; specs that use them are rejected.

Remove an entry when its feature is implemented. The spec already contains every field, so nothing else changes then.
"""

from __future__ import annotations

from pydantic import BaseModel

from zeta_core.contract.errors import ErrorDetail
from zeta_core.contract.spec.validation import shown


def faults(options: BaseModel) -> list[ErrorDetail]:
    """One detail (code ``not_available_yet``) for every value that is not supported yet."""
    details: list[ErrorDetail] = []
    resources = getattr(options, "resources", None)
    nodes = getattr(resources, "nodes", 1)
    if nodes > 1:
        details.append(_detail("resources.nodes", nodes, "use 1"))
    if (elastic := getattr(options, "elastic", None)) is not None:
        details.append(_detail("elastic", elastic.model_dump(), "omit it"))
    return details


def _detail(param: str, value: object, fix: str) -> ErrorDetail:
    message = f"{param} is {shown(value)}, which is not available yet; {fix}."
    return ErrorDetail(param=param, message=message, code="not_available_yet")
