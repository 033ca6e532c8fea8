"""The clients for asyncio take the same arguments as those without it."""

from inspect import Parameter, iscoroutinefunction, signature

import pytest

from zeta.async_client import AsyncClient
from zeta.async_webhooks import AsyncWebhooks
from zeta.client import Client
from zeta.webhooks import Webhooks


def parameters(method: object) -> dict[str, Parameter]:
    """The parameters of a method, without the callbacks that report progress."""
    assert callable(method)
    found = signature(method).parameters
    return {name: parameter for name, parameter in found.items() if not name.startswith("on_")}


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))}


def test_webhooks_have_the_same_methods_for_asyncio() -> None:
    assert public(AsyncWebhooks) == public(Webhooks)
    for name in public(Webhooks):
        assert iscoroutinefunction(getattr(AsyncWebhooks, name))
        assert parameters(getattr(AsyncWebhooks, name)) == parameters(getattr(Webhooks, name)), name


@pytest.mark.parametrize("name", sorted(public(AsyncClient)))
def test_methods_of_both_clients_have_the_same_parameters(name: str) -> None:
    ours, theirs = parameters(getattr(AsyncClient, name)), parameters(getattr(Client, name))
    assert {key: value.default for key, value in ours.items()} == {key: value.default for key, value in theirs.items()}
