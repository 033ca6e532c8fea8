"""What each option of a spec affects, declared once beside its field; tables of options are derived from it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

Effect = Literal[
    "results",  # the trained weights and evaluations; a resumed run must keep it
    "batch",  # how a global batch is split; a resumed run may change the split, but not its product
    "length",  # the number of steps, which a resumed run may change
    "documents",  # the tokens of the documents
    "sequences",  # the number of sequences in an epoch
    "speed",  # the time per sequence on a device
]


class Affects:
    """Annotates a field with its effects. ``Affects()``: the field has no effect on training."""

    def __init__(self, *effects: Effect) -> None:
        self.effects = frozenset(effects)


def field_effects(model: type[BaseModel], name: str) -> frozenset[Effect]:
    """The effects of a field. Raises `LookupError` if it is not annotated."""
    for metadata in model.model_fields[name].metadata:
        if isinstance(metadata, Affects):
            return metadata.effects
    raise LookupError(f"{model.__name__}.{name} has no Affects(...)")


def options_affecting(model: type[BaseModel], effect: Effect) -> tuple[str, ...]:
    """The names of the fields with this effect, in the order of the fields."""
    return tuple(name for name in model.model_fields if effect in field_effects(model, name))
