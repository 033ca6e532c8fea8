"""The ASGI application: routes, errors, and the description of both at ``/openapi.json``."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry
from pydantic.json_schema import models_json_schema

from server.http.browser_protection import HostCheck, SecurityHeaders, cors_middleware
from server.http.error_responses import ERROR_RESPONSES, register_error_handlers
from server.http.proxies import ProxyMiddleware
from server.http.request_log import RequestLogMiddleware, RequestMetrics
from server.http.request_traces import RequestTraceMiddleware
from server.metrics import JobMetrics
from server.openai.batches import Batches, NewBatch
from server.openai.errors import error_response_of, register_routing_errors
from server.openai.fine_tuning import FineTuning
from server.openai.fine_tuning_request import FineTuningRequest
from server.openai.uploads import CompletionRequest, UploadRequest
from server.openai.webhook_endpoints import EndpointChange, EndpointTest, NewEndpoint, SecretRotation
from server.routes import (
    access,
    checkpoints,
    evaluations,
    exports,
    files,
    job_output,
    jobs,
    login_links,
    model_names,
    openai_answers,
    openai_batches,
    openai_files,
    openai_fine_tuning,
    openai_models,
    openai_webhooks,
    operations,
    sweeps,
    webhooks,
    workers,
)
from server.service import Service
from server.submitting.submissions import Submissions
from server.web.routes import ROUTERS as PAGE_ROUTERS
from zeta_core.contract.access import (
    KeyRotation,
    NewKey,
    NewProject,
    NewWorkerSecret,
    ProjectChange,
    WorkerSecretRotation,
)
from zeta_core.contract.job import events
from zeta_core.contract.job.commands import Rerun
from zeta_core.contract.job.data_preview import PreviewRequest
from zeta_core.contract.job.sweep import SweepRequest
from zeta_core.contract.model_names import NewModelName
from zeta_core.contract.openai.answer_parameters import ChatParameters, TextParameters
from zeta_core.contract.spec.evaluation_spec import NewEvaluation
from zeta_core.contract.spec.export_spec import ExportRequest
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.webhooks import NewWebhook, WebhookChange
from zeta_core.system.distribution import version

REF = "#/components/schemas/{model}"
BODIES = (
    *(JobSpec, ExportRequest, NewEvaluation, Rerun, SweepRequest, PreviewRequest),
    *(NewKey, KeyRotation, NewProject, ProjectChange),
    *(FineTuningRequest, UploadRequest, CompletionRequest, NewBatch, NewModelName),
    *(ChatParameters, TextParameters, NewWebhook, WebhookChange),
    *(NewEndpoint, EndpointChange, SecretRotation, EndpointTest),
    *(NewWorkerSecret, WorkerSecretRotation),
)


def create_app(service: Service) -> FastAPI:
    """Create the application of an open service."""
    app = FastAPI(
        title="Zeta",
        version=version(),
        summary="A self-hosted training service for causal language models",
        docs_url=None,  # the documentation pages would load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
        responses=ERROR_RESPONSES,
    )
    registry = CollectorRegistry()
    app.state.service = service
    app.state.submissions = Submissions(service)
    app.state.fine_tuning = FineTuning(service, app.state.submissions)
    app.state.batches = Batches(service, app.state.submissions)
    app.state.job_metrics = JobMetrics(registry)
    settings = service.settings
    app.add_middleware(HostCheck, listens_on=settings.loopback_host)  # the middleware added last runs first
    app.add_middleware(RequestLogMiddleware, metrics=RequestMetrics(registry), response_of=error_response_of)
    if service.tracing is not None:
        app.add_middleware(RequestTraceMiddleware, tracing=service.tracing)
    app.add_middleware(ProxyMiddleware, trusted=settings.trusted_networks, root_path=settings.root_path)
    if settings.cross_origins:
        app.add_middleware(cors_middleware, origins=settings.cross_origins)
    app.add_middleware(SecurityHeaders)
    register_error_handlers(app)
    register_routing_errors(app)
    of_jobs = (jobs, sweeps, job_output, checkpoints, evaluations, exports)
    modules = (*of_jobs, files, workers, access, login_links, model_names, webhooks, operations)
    openai_modules = (
        *(openai_answers, openai_batches, openai_files, openai_fine_tuning, openai_models, openai_webhooks),
    )
    routers = (*(module.router for module in (*modules, *openai_modules)), *PAGE_ROUTERS)
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    app.openapi = lambda: _description(app)
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, plus the models of the bodies that routes parse themselves."""
    if app.openapi_schema is None:
        description = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        _, further = models_json_schema(
            [*((model, "validation") for model in BODIES), *((line, "serialization") for line in events.LINE_MODELS)],
            ref_template=REF,
        )
        description["components"]["schemas"] = {**further["$defs"], **description["components"]["schemas"]}
        app.openapi_schema = description
    return app.openapi_schema
