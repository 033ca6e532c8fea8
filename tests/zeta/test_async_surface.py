"""The clients for asyncio have the methods and parameters of the blocking ones."""

from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction, signature

import pytest

from zeta import async_parts
from zeta.administration import Administration
from zeta.async_client import AsyncClient
from zeta.client import Client
from zeta.client_job import AsyncJob, ClientJob
from zeta.named_models import NamedModels
from zeta.receipts import Receipts
from zeta.sweeps import Sweeps
from zeta.webhooks import Webhooks
from zeta_core.contract.job.job import Job

PAIRS: dict[type, type] = {
    AsyncClient: Client,
    AsyncJob: ClientJob,
    async_parts.AsyncAdministration: Administration,
    async_parts.AsyncNamedModels: NamedModels,
    async_parts.AsyncReceipts: Receipts,
    async_parts.AsyncSweeps: Sweeps,
    async_parts.AsyncWebhooks: Webhooks,
}
STREAMS = {"events", "logs"}


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")} - set(dir(Job))


@pytest.mark.parametrize("ours", PAIRS, ids=lambda kind: kind.__name__)
def test_a_class_for_asyncio_has_the_same_methods_and_parameters(ours: type) -> None:
    theirs = PAIRS[ours]
    assert public(ours) == public(theirs)
    for name in public(ours) - {"of"}:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if not callable(other):
            assert isinstance(mine, property), name
            continue
        parameters = [
            {key: value.default for key, value in signature(method).parameters.items()} for method in (mine, other)
        ]
        assert parameters[0] == parameters[1], name
        if name in STREAMS:
            assert isasyncgenfunction(mine) or ours is AsyncJob, name
            assert not isgeneratorfunction(mine), name
        else:
            assert iscoroutinefunction(mine) or name == "close", name
        assert mine.__doc__ or not other.__doc__ or ours is AsyncJob, name
