"""The settings in which two resolved specs differ, as a user would write them: ``lora.r``, ``learning_rate``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from zeta_core.contract.spec.resolved_spec import ResolvedSpec

# What a run records about itself is not a setting, and differs between any two jobs.
_NOT_SETTINGS = frozenset({"run_id", "files", "data_report", "template_date", "entity_name", "metadata"})


# What a run decides or records: until it has begun, nothing is known about these.
_FROM_THE_RUN = frozenset(ResolvedSpec.model_fields) | {"data"}


def differing_settings(first: ResolvedSpec, second: ResolvedSpec) -> dict[str, tuple[Any, Any]]:
    """The values in ``first`` and ``second`` by dotted name, in the order of the spec; ``None`` for a missing value.

    Uploaded files with the same content are equal, whatever their ids are. A value that the run decides is compared
    only if both runs have begun, or both values are known.
    """
    values = [dict(_settings(spec)) for spec in (first, second)]
    names = list(dict.fromkeys([*values[0], *values[1]]))
    pairs = {name: (values[0].get(name), values[1].get(name)) for name in names}
    have_begun = first.run_id is not None and second.run_id is not None
    return {
        name: pair
        for name, pair in pairs.items()
        if pair[0] != pair[1] and (have_begun or None not in pair or name.partition(".")[0] not in _FROM_THE_RUN)
    }


def _settings(spec: ResolvedSpec) -> Iterator[tuple[str, Any]]:
    files = {file_id: _file_name(file_id, file.filename, file.sha256) for file_id, file in spec.files.items()}
    for name, value in spec.as_json().items():
        if name not in _NOT_SETTINGS:
            yield from _flat(name, value, files)


def _flat(name: str, value: Any, files: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in cast("dict[str, Any]", value).items():
            yield from _flat(f"{name}.{key}", inner, files)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in cast("list[Any]", value)):
        for number, item in enumerate(cast("list[Any]", value)):
            yield from _flat(f"{name}[{number}]", item, files)
    elif isinstance(value, list):
        yield name, [files.get(str(item), item) for item in cast("list[Any]", value)]
    else:
        yield name, files.get(value, value) if isinstance(value, str) else value


def _file_name(file_id: str, filename: str, sha256: str | None) -> str:
    return f"{filename} ({sha256[:12]})" if sha256 is not None else file_id
