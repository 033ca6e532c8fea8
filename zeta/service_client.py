"""The part of `Client` that is not about jobs: the connection to a service, its files, workers and administration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

import httpx

from zeta.errors import Unreachable, parse_response
from zeta.pagination import read_pages
from zeta.server_lookup import ClientSettings, find_server
from zeta.transport import HttpTransport
from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.machine_usage import WorkerUsage
from zeta_core.contract.job.responses import FilePurpose, FileUse, LoginLink, StoredFile, Worker
from zeta_core.system.settings import process_environment

if TYPE_CHECKING:
    from zeta.administration import Administration
    from zeta.receipts import Receipts
    from zeta.webhooks import Webhooks

PATIENCE_SECONDS = 5.0  # a server that restarts is back within this


class ServiceClient:
    """The connection to one service with one API key."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        project: str | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
        use_proxy: bool = True,
        certificate: str | None = None,
    ) -> None:
        """``project`` (default: ZETA_PROJECT) is the project in which an admin key acts; other keys act in their own.
        ``patience_seconds`` is how long a request is retried while the server does not respond. With
        ``use_proxy=False``, the client ignores proxy variables; a server on this machine is always reached directly.
        ``certificate`` is the server's own certificate (PEM), which is trusted instead of authorities; for a `zeta up`
        on this machine, it is found like the URL.

        Raises `Unreachable` if no server is configured and none runs on this machine, and `InvalidSettings` if an
        environment variable is invalid.
        """
        variables = process_environment()
        target = find_server(variables, url=base_url, api_key=api_key)
        if target is None:
            raise Unreachable(
                "No Zeta server is configured; start one with `zeta up`, or set ZETA_URL, or run `zeta login URL`."
            )
        self.base_url = target.url
        self._transport = HttpTransport(
            target.url,
            target.api_key,
            project=ClientSettings.from_environment(variables, project=project).project,
            patience_seconds=patience_seconds,
            variables=variables,
            use_proxy=use_proxy and not target.is_local,
            certificate=certificate or target.certificate,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; a `with` statement does so at its end."""
        self._transport.close()

    @property
    def admin(self) -> Administration:
        """Managing keys, projects and the secrets of workers, and reading the audit log."""
        from zeta.administration import Administration

        return Administration(self._transport)

    @property
    def webhooks(self) -> Webhooks:
        """Managing the webhooks of the project."""
        from zeta.webhooks import Webhooks

        return Webhooks(self._transport)

    @property
    def receipts(self) -> Receipts:
        """Reading the signed receipts of jobs; `zeta.receipts.verify` compares a folder with one."""
        from zeta.receipts import Receipts

        return Receipts(self._transport)

    # --- Files and workers --------------------------------------------------------------------------------------------

    def upload(
        self,
        path: str | Path,
        purpose: FilePurpose = "dataset",
        *,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> StoredFile:
        """Upload a file, streamed from disk. A file that the service already has is not sent again.

        ``on_bytes`` is called with the number of bytes sent and the file's size.
        """
        from zeta.upload import upload

        return upload(self._transport, Path(path), purpose, on_bytes=on_bytes)

    def files(self, *, sha256: str | None = None, limit: int | None = 20) -> list[StoredFile]:
        """List the uploaded files, newest first; ``sha256`` selects those with this content."""
        return list(read_pages(self._transport, StoredFile, "/v1/files", {"sha256": sha256}, limit))

    def jobs_of_file(self, file_id: str) -> list[FileUse]:
        """List the jobs whose models saw a file, also through the checkpoints of other jobs, newest first."""
        from zeta.lineage import jobs_of_file

        return jobs_of_file(self._transport, file_id)

    def workers(self) -> list[Worker]:
        """List the workers with their slots, devices and newest measurements."""
        return list(read_pages(self._transport, Worker, "/v1/workers", {}, None))

    def worker_usage(self, worker: str, *, hours: int = 1) -> WorkerUsage:
        """Read the usage of a worker's cores, memory and GPUs in the last ``hours``, at most 168.

        Each value is a mean over 15 seconds, or over five minutes for more than one hour.
        """
        path = f"/v1/workers/{quote(worker, safe='')}/usage"
        return parse_response(WorkerUsage, self._transport.request("GET", path, params={"hours": hours}))

    def drain(self, worker: str, *, draining: bool = True) -> Worker:
        """Drain a worker: it hands back its jobs and gets no new ones. ``draining=False`` undoes it. Admin only."""
        action = "drain" if draining else "undrain"
        return parse_response(Worker, self._transport.request("POST", f"/v1/workers/{quote(worker, safe='')}/{action}"))

    def login_link(self) -> LoginLink:
        """Create a link that logs a browser in to the dashboard with this key, once and within some minutes."""
        return parse_response(LoginLink, self._transport.request("POST", "/v1/login-links"))

    def is_ready(self) -> bool:
        """Whether the service reports that it is ready for jobs. Does not retry."""
        try:
            with self._transport.stream("GET", "/readyz", read_seconds=5.0):
                return True
        except (httpx.TransportError, ZetaError):
            return False
