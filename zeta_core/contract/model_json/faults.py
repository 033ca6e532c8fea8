"""The error for an untrusted model file, and the location in a JSON file that it reports."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal, NoReturn

from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.spec.validation import shown

# The origin of a model. A user who uploads a model or writes a spec can fix it, so everything that would be ignored is
# rejected. A Hub repository or an earlier checkpoint can't be fixed by the user: keys that only refer to the model's
# own code are dropped, and its weights are loaded by the library's class.
Origin = Literal["upload", "spec", "external"]


class InvalidModelFiles(InvalidRequest):
    """A file of a model is malformed or names something outside the model."""

    code = "invalid_model"


@dataclass(frozen=True)
class JsonLocation:
    """A JSON object in a model's files.

    ``siblings`` are the names of the files in the same folder. ``ignored`` collects the keys that refer to code and are
    omitted.
    """

    file: str
    siblings: Collection[str] = frozenset()
    origin: Origin = "upload"
    path: tuple[str, ...] = field(default=())
    ignored: list[str] = field(default_factory=list[str], compare=False)

    def inside(self, key: str) -> JsonLocation:
        return replace(self, path=(*self.path, key))

    def ignore(self, key: str) -> None:
        """Record a key that is omitted because it refers to code."""
        self.ignored.append(".".join((*self.path, key)))

    def reject(self, key: str, value: object, why: str) -> NoReturn:
        """Raise `InvalidModelFiles` for the value of a key; ``why`` contains the fault and the fix."""
        name = ".".join((*self.path, key))
        if self.origin == "spec":
            param = f"{self.file}.{name}"
            raise InvalidModelFiles(f"{param} is {shown(value)}; {why}.", param=param)
        raise InvalidModelFiles(f"{self.file} has {name[:200]!r} = {shown(value)}; {why}.")
