"""The scope that each route requires: the only place that decides what a key may do.

A route that is missing here requires ``admin``, and `tests/server/test_scopes.py` fails. HEAD requires the same as GET.
"""

from __future__ import annotations

from collections.abc import Mapping

from zeta_core.contract.access import Scope

OPEN = frozenset({"GET /healthz", "GET /readyz"})  # no key

SCOPES: Mapping[str, Scope] = {
    "GET /v1/jobs": Scope.READ,
    "POST /v1/jobs": Scope.SUBMIT,
    "POST /v1/jobs/validate": Scope.SUBMIT,
    "POST /v1/jobs/preview": Scope.SUBMIT,
    "GET /v1/jobs/{job_id}": Scope.READ,
    "DELETE /v1/jobs/{job_id}": Scope.SUBMIT,
    "POST /v1/jobs/{job_id}/cancel": Scope.SUBMIT,
    "POST /v1/jobs/{job_id}/pause": Scope.SUBMIT,
    "POST /v1/jobs/{job_id}/resume": Scope.SUBMIT,
    "POST /v1/jobs/{job_id}/checkpoint": Scope.SUBMIT,
    "POST /v1/jobs/{job_id}/rerun": Scope.SUBMIT,
    "GET /v1/jobs/{job_id}/receipt": Scope.READ,
    "GET /v1/receipt-key": Scope.READ,
    "GET /v1/jobs/{job_id}/exports": Scope.READ,
    "POST /v1/jobs/{job_id}/exports": Scope.SUBMIT,
    "POST /v1/jobs/{job_id}/evaluations": Scope.SUBMIT,
    "GET /v1/jobs/{job_id}/events": Scope.READ,
    "GET /v1/jobs/{job_id}/logs": Scope.READ,
    "GET /v1/jobs/{job_id}/metrics": Scope.READ,
    "GET /v1/jobs/{job_id}/checkpoints": Scope.READ,
    "GET /v1/jobs/{job_id}/checkpoints/{name}": Scope.READ,
    "GET /v1/jobs/{job_id}/checkpoints/{name}/files/{path}": Scope.READ,
    "GET /v1/jobs/{job_id}/checkpoints/{name}/archive": Scope.READ,
    "GET /v1/sweeps": Scope.READ,
    "POST /v1/sweeps": Scope.SUBMIT,
    "GET /v1/sweeps/{sweep_id}": Scope.READ,
    "POST /v1/sweeps/{sweep_id}/cancel": Scope.SUBMIT,
    "GET /v1/files": Scope.READ,
    "POST /v1/files": Scope.SUBMIT,
    "GET /v1/files/{file_id}": Scope.READ,
    "GET /v1/files/{file_id}/jobs": Scope.READ,
    "GET /v1/files/{file_id}/content": Scope.SUBMIT,  # training data may be confidential; checkpoints are the result
    "DELETE /v1/files/{file_id}": Scope.SUBMIT,
    "GET /v1/models": Scope.READ,
    "POST /v1/models": Scope.SUBMIT,
    "DELETE /v1/models/{name}": Scope.SUBMIT,
    "GET /v1/webhooks": Scope.SUBMIT,  # a URL may be confidential, such as one of Slack
    "POST /v1/webhooks": Scope.SUBMIT,
    "GET /v1/webhooks/{webhook_id}": Scope.SUBMIT,
    "PATCH /v1/webhooks/{webhook_id}": Scope.SUBMIT,
    "DELETE /v1/webhooks/{webhook_id}": Scope.SUBMIT,
    "POST /v1/webhooks/{webhook_id}/rotate": Scope.SUBMIT,
    "POST /v1/webhooks/{webhook_id}/test": Scope.SUBMIT,
    "GET /v1/webhooks/{webhook_id}/deliveries": Scope.SUBMIT,
    "GET /v1/jobs/{job_id}/deliveries": Scope.SUBMIT,
    "GET /v1/workers": Scope.READ,
    "POST /v1/workers": Scope.ADMIN,
    "GET /v1/workers/secrets": Scope.ADMIN,
    "GET /v1/workers/{name}/usage": Scope.READ,
    "POST /v1/workers/{name}/rotate": Scope.ADMIN,
    "DELETE /v1/workers/{name}": Scope.ADMIN,
    "POST /v1/workers/{name}/drain": Scope.ADMIN,
    "POST /v1/workers/{name}/undrain": Scope.ADMIN,
    "GET /v1/keys": Scope.ADMIN,
    "POST /v1/keys": Scope.ADMIN,
    "GET /v1/keys/me": Scope.READ,
    "GET /v1/keys/{key_id}": Scope.ADMIN,
    "DELETE /v1/keys/{key_id}": Scope.ADMIN,
    "POST /v1/keys/{key_id}/rotate": Scope.ADMIN,
    "GET /v1/projects": Scope.READ,
    "POST /v1/projects": Scope.ADMIN,
    "GET /v1/projects/{project}": Scope.READ,
    "PATCH /v1/projects/{project}": Scope.ADMIN,
    "DELETE /v1/projects/{project}": Scope.ADMIN,
    "GET /v1/audit": Scope.ADMIN,
    "POST /v1/login-links": Scope.READ,
    "GET /metrics": Scope.METRICS,
    "POST /openai/v1/chat/completions": Scope.READ,  # `read` also allows downloading the weights
    "POST /openai/v1/completions": Scope.READ,
    "GET /openai/v1/webhook_endpoints": Scope.SUBMIT,
    "POST /openai/v1/webhook_endpoints": Scope.SUBMIT,
    "GET /openai/v1/webhook_endpoints/{webhook_endpoint_id}": Scope.SUBMIT,
    "POST /openai/v1/webhook_endpoints/{webhook_endpoint_id}": Scope.SUBMIT,
    "DELETE /openai/v1/webhook_endpoints/{webhook_endpoint_id}": Scope.SUBMIT,
    "POST /openai/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": Scope.SUBMIT,
    "POST /openai/v1/webhook_endpoints/{webhook_endpoint_id}/test": Scope.SUBMIT,
    "GET /openai/v1/batches": Scope.READ,
    "POST /openai/v1/batches": Scope.SUBMIT,
    "GET /openai/v1/batches/{batch_id}": Scope.READ,
    "POST /openai/v1/batches/{batch_id}/cancel": Scope.SUBMIT,
    "GET /openai/v1/files": Scope.READ,
    "POST /openai/v1/files": Scope.SUBMIT,
    "GET /openai/v1/files/{file_id}": Scope.READ,
    "GET /openai/v1/files/{file_id}/content": Scope.READ,  # an uploaded file requires `submit`; see `files.content`
    "DELETE /openai/v1/files/{file_id}": Scope.SUBMIT,
    "POST /openai/v1/uploads": Scope.SUBMIT,
    "POST /openai/v1/uploads/{upload_id}/parts": Scope.SUBMIT,
    "POST /openai/v1/uploads/{upload_id}/complete": Scope.SUBMIT,
    "POST /openai/v1/uploads/{upload_id}/cancel": Scope.SUBMIT,
    "GET /openai/v1/fine_tuning/jobs": Scope.READ,
    "POST /openai/v1/fine_tuning/jobs": Scope.SUBMIT,
    "GET /openai/v1/fine_tuning/jobs/{job_id}": Scope.READ,
    "POST /openai/v1/fine_tuning/jobs/{job_id}/cancel": Scope.SUBMIT,
    "POST /openai/v1/fine_tuning/jobs/{job_id}/pause": Scope.SUBMIT,
    "POST /openai/v1/fine_tuning/jobs/{job_id}/resume": Scope.SUBMIT,
    "GET /openai/v1/fine_tuning/jobs/{job_id}/events": Scope.READ,
    "GET /openai/v1/fine_tuning/jobs/{job_id}/checkpoints": Scope.READ,
    "GET /openai/v1/fine_tuning/checkpoints/{checkpoint}/permissions": Scope.READ,
    "POST /openai/v1/fine_tuning/checkpoints/{checkpoint}/permissions": Scope.SUBMIT,
    "DELETE /openai/v1/fine_tuning/checkpoints/{checkpoint}/permissions/{permission_id}": Scope.SUBMIT,
    "POST /openai/v1/fine_tuning/alpha/graders/run": Scope.SUBMIT,
    "POST /openai/v1/fine_tuning/alpha/graders/validate": Scope.SUBMIT,
    "GET /openai/v1/models": Scope.READ,
    "GET /openai/v1/models/{model}": Scope.READ,
    "DELETE /openai/v1/models/{model}": Scope.SUBMIT,
}


def is_open(method: str, path: str) -> bool:
    """Whether the route needs no key. ``path`` is the route's template, such as ``/v1/jobs/{job_id}``."""
    return _name(method, path) in OPEN


def required_scope(method: str, path: str) -> Scope:
    """The scope that a request to the route with this path template requires."""
    return SCOPES.get(_name(method, path), Scope.ADMIN)


def _name(method: str, path: str) -> str:
    return f"{'GET' if method == 'HEAD' else method} {path}"
