"""docs/reference/python.md: every method of the Python client and of the objects it returns, from the code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from tests.harness.reference_pages.markdown import generated
from zeta.administration import Administration
from zeta.client import Client
from zeta.client_job import ClientJob
from zeta.named_models import NamedModels
from zeta.receipts import Receipts
from zeta.sweeps import Sweeps
from zeta.webhooks import Webhooks
from zeta_core.contract.job.job import Job

HEAD = """\
# The Python client

`from zeta import Client` needs only the bare package, without PyTorch. A client finds the server and its key like the
`zeta` command: from `ZETA_URL` and `ZETA_API_KEY`, `zeta login`, or a `zeta up` on the same machine.
[Job commands by state](../commands.md#from-python) has examples. Failures raise a `ZetaError`
(`zeta_core.contract.errors`), whose `code` is listed on the page [Errors](errors.md).

`AsyncClient` has the same methods and parameters as coroutines, such as `await client.submit(spec)`. `events` and
`logs` are asynchronous iterators there, and `close` is an ordinary method.
"""
SECTIONS: tuple[tuple[str, str, type], ...] = (
    ("`Client`", "", Client),
    (
        "Jobs",
        "The methods that create and read jobs return objects with the fields of the API's job object and these "
        "methods. An object doesn't change; the methods return new ones. A notebook shows a job as a table.",
        ClientJob,
    ),
    ("`client.sweeps`", inspect.getdoc(Client.sweeps) or "", Sweeps),
    ("`client.models`", inspect.getdoc(Client.models) or "", NamedModels),
    ("`client.webhooks`", inspect.getdoc(Client.webhooks) or "", Webhooks),
    ("`client.receipts`", inspect.getdoc(Client.receipts) or "", Receipts),
    ("`client.admin`", inspect.getdoc(Client.admin) or "", Administration),
)
NOT_SHOWN = {"of", "model_post_init"}  # for the client itself and for pydantic


def python_page() -> str:
    parts = [HEAD, generated("zeta/client.py and the modules next to it")]
    for title, text, kind in SECTIONS:
        parts += [f"## {title}\n", f"{text or _docstring(kind)}\n", *_methods(kind)]
    return "\n".join(parts)


def _methods(kind: type) -> Iterator[str]:
    if kind is Client:
        yield _entry("Client", kind.__init__)
    for name, method in _public(kind).items():
        yield _entry(name, method)


def _public(kind: type) -> dict[str, Callable[..., Any]]:
    """The public methods of a class and of its bases in their order, without those of every job object."""
    bases = [base for base in kind.__mro__ if not issubclass(Job, base)]
    found = {name: value for base in bases for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name: getattr(kind, name) for name in found if not name.startswith("_") and name not in NOT_SHOWN}


def _entry(name: str, method: Callable[..., Any]) -> str:
    text = _docstring(method)
    return f"```text\n{_signature(name, method)}\n```\n" + (f"\n{text}\n" if text else "")


def _docstring(described: object) -> str:
    return inspect.getdoc(described) or ""


def _signature(name: str, method: Callable[..., Any], width: int = 100) -> str:
    """A call with types and defaults, on one line if it fits."""
    found = inspect.signature(method)
    parameters = [parameter for key, parameter in found.parameters.items() if key != "self"]
    words = list(_words(parameters))
    end = "" if name == "Client" else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(words)}){end}"
    return line if len(line) <= width else "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){end}"])


def _words(parameters: list[inspect.Parameter]) -> Iterator[str]:
    is_after_star = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not is_after_star:
            is_after_star = True
            yield "*"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        yield f"{stars}{parameter.name}: {parameter.annotation}{default}"


def _default(value: object) -> str:
    return "..." if callable(value) else repr(value.value) if isinstance(value, Enum) else repr(value)
