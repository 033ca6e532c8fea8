"""Creating, reading and cancelling sweeps: `Client.sweeps`.

with Client() as client:
    sweep = client.sweeps.create(spec, {"learning_rate": [1e-4, 3e-4], "lora.r": [8, 16]})
    print(client.sweeps.get(sweep.id).best)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zeta.errors import parse_response
from zeta.pagination import read_pages
from zeta.request_parts import creation_headers, json_body, path_segment
from zeta.transport import HttpTransport
from zeta_core.contract.job.halving import Halving
from zeta_core.contract.job.sweep import Sweep, SweepResult

if TYPE_CHECKING:
    from zeta_core.contract.spec.job_spec import JobSpec

ReadSpec = Callable[["JobSpec | Mapping[str, Any]", Callable[[str], None]], dict[str, Any]]


class Sweeps:
    """Each method calls one route of the API."""

    def __init__(self, transport: HttpTransport, read_spec: ReadSpec) -> None:
        """``read_spec`` uploads the local files that a spec names and returns the spec to send."""
        self._transport = transport
        self._read_spec = read_spec

    def create(
        self,
        spec: JobSpec | Mapping[str, Any],
        grid: Mapping[str, Sequence[Any]],
        *,
        random: int | None = None,
        seed: int | None = None,
        halving: Halving | Mapping[str, int] | None = None,
        idempotency_key: str | None = None,
        on_upload: Callable[[str], None] = lambda _: None,
    ) -> SweepResult:
        """Create a job for each combination of ``grid``, which lists the values of fields by their dotted names.

        With ``random``, only that many combinations are created, chosen with ``seed``. With ``halving``, such as
        ``{"steps": 100, "factor": 2}``, the jobs are compared at step 100, 200, 400 …, and only the better half
        continues. The spec and the grid may name local files. Raises `InvalidRequest` naming the first invalid
        combination; then no job is created.
        """
        values = {
            name: [self._read_spec({name: value}, on_upload)[name] for value in listed] for name, listed in grid.items()
        }
        body: dict[str, Any] = {"spec": self._read_spec(spec, on_upload), "grid": values}
        compared = halving.model_dump() if isinstance(halving, Halving) else halving
        options = {"random": random, "seed": seed, "halving": compared}
        body |= {name: value for name, value in options.items() if value is not None}
        response = self._transport.request(
            "POST", "/v1/sweeps", content=json_body(body), headers=creation_headers(idempotency_key)
        )
        return parse_response(SweepResult, response)

    def list(self, *, limit: int | None = 20) -> list[Sweep]:
        """Sweeps without their jobs, newest first; ``limit=None`` lists all of them."""
        return [*read_pages(self._transport, Sweep, "/v1/sweeps", {}, limit)]

    def get(self, sweep_id: str) -> SweepResult:
        """A sweep with its jobs, their losses, and the best job."""
        return parse_response(SweepResult, self._transport.request("GET", f"/v1/sweeps/{path_segment(sweep_id)}"))

    def cancel(self, sweep_id: str) -> SweepResult:
        """Cancel all unfinished jobs of a sweep."""
        path = f"/v1/sweeps/{path_segment(sweep_id)}/cancel"
        return parse_response(SweepResult, self._transport.request("POST", path))
