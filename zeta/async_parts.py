"""The parts of `AsyncClient`: sweeps, named models, administration, webhooks and receipts.

Each class has the methods of its blocking class, as coroutines.
"""

from __future__ import annotations

from zeta.administration import Administration
from zeta.async_calls import AsyncPart, awaitable
from zeta.named_models import NamedModels
from zeta.receipts import Receipts
from zeta.sweeps import Sweeps
from zeta.webhooks import Webhooks


class AsyncSweeps(AsyncPart):
    """Creating, reading and cancelling sweeps."""

    create = awaitable(Sweeps.create)
    list = awaitable(Sweeps.list)
    get = awaitable(Sweeps.get)
    cancel = awaitable(Sweeps.cancel)


class AsyncNamedModels(AsyncPart):
    """Naming base models for the `openai` client."""

    add = awaitable(NamedModels.add)
    list = awaitable(NamedModels.list)
    remove = awaitable(NamedModels.remove)


class AsyncAdministration(AsyncPart):
    """Managing keys, workers and projects, and reading the audit log."""

    create_key = awaitable(Administration.create_key)
    keys = awaitable(Administration.keys)
    own_key = awaitable(Administration.own_key)
    rotate_key = awaitable(Administration.rotate_key)
    revoke_key = awaitable(Administration.revoke_key)
    add_worker = awaitable(Administration.add_worker)
    worker_secrets = awaitable(Administration.worker_secrets)
    rotate_worker_secret = awaitable(Administration.rotate_worker_secret)
    revoke_worker = awaitable(Administration.revoke_worker)
    create_project = awaitable(Administration.create_project)
    project = awaitable(Administration.project)
    set_limits = awaitable(Administration.set_limits)
    projects = awaitable(Administration.projects)
    delete_project = awaitable(Administration.delete_project)
    audit = awaitable(Administration.audit)


class AsyncWebhooks(AsyncPart):
    """Managing the webhooks of the project."""

    create = awaitable(Webhooks.create)
    list = awaitable(Webhooks.list)
    get = awaitable(Webhooks.get)
    change = awaitable(Webhooks.change)
    rotate = awaitable(Webhooks.rotate)
    test = awaitable(Webhooks.test)
    deliveries = awaitable(Webhooks.deliveries)
    of_job = awaitable(Webhooks.of_job)
    delete = awaitable(Webhooks.delete)


class AsyncReceipts(AsyncPart):
    """Reading the signed receipts of jobs; `zeta.receipts.verify` compares a folder with one."""

    get = awaitable(Receipts.get)
    key = awaitable(Receipts.key)
