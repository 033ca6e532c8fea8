"""The users: they post jobs, cancel, pause and resume over HTTP, and try again as a careful script would.

Only an answer counts: a job is accepted when its 201 was read, a command when its 202 was. What was not answered is
sent again, to whichever server answers, with the same Idempotency-Key.
"""

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import httpx

from tests.chaos.orders import Order
from tests.server.serving import ServerProcess
from zeta_core.contract.job.status import ENDED, StatusReason

REST_SECONDS = 1.0
ANSWER_SECONDS = 4.0


class Users:
    """Once for a whole game; `serve` may be called again when all have ended."""

    def __init__(self, servers: Sequence[ServerProcess]) -> None:
        self.accepted: dict[str, Order] = {}  # by job id
        self.obeyed: dict[str, list[str]] = {}  # commands that were answered with 202, by job id
        self.refused: list[str] = []  # answers that no user should get
        self.all_ended = threading.Event()
        self._servers = servers
        self._orders: list[Order] = []
        self._unended: set[str] = set()
        self._given_up = threading.Event()
        self._turn = itertools.count()

    @property
    def num_waiting(self) -> int:
        """How many jobs are not posted, or not ended, yet."""
        return len(self._orders) + len(self._unended)

    def serve(self, orders: Sequence[Order], *, at_once: int) -> None:
        """Begin to keep ``at_once`` jobs unended, in a thread, until each of these is accepted and ended."""
        self._orders = list(orders)
        self.all_ended.clear()
        threading.Thread(target=self._serve, args=(at_once,), name="users", daemon=True).start()

    def give_up(self) -> None:
        """Ask for nothing more."""
        self._given_up.set()

    def _serve(self, at_once: int) -> None:
        while not self._given_up.is_set() and self.num_waiting:
            while self._orders and len(self._unended) < at_once and self.post(self._orders[0]):
                self._orders.pop(0)
            for job_id in sorted(self._unended):
                self._attend_to(job_id)
            self._given_up.wait(REST_SECONDS)
        if not self.num_waiting:
            self.all_ended.set()

    def post(self, order: Order) -> str | None:
        """The id of the accepted job; ``None`` where nobody answered."""
        answer = self.ask("POST", "/v1/jobs", json=order.spec, headers={"Idempotency-Key": order.key})
        if answer is None:
            return None
        if answer.status_code != 201:
            self.refused.append(f"POST /v1/jobs of {order.key} was answered {answer.status_code}: {answer.text}")
            return order.key
        job_id = str(answer.json()["id"])
        self.accepted[job_id] = order
        self._unended.add(job_id)
        return job_id

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer of the next server; ``None`` where there is none, or none that counts (a 5xx)."""
        server = self._servers[next(self._turn) % len(self._servers)]
        try:
            with server.http() as http:
                answer = http.request(method, path, timeout=ANSWER_SECONDS, **request)
        except httpx.TransportError:
            return None
        return answer if answer.status_code < 500 else None

    def _attend_to(self, job_id: str) -> None:
        answer = self.ask("GET", f"/v1/jobs/{job_id}")
        if answer is None:
            return
        if answer.status_code != 200:
            self.refused.append(f"GET of the accepted job {job_id} was answered {answer.status_code}: {answer.text}")
            self._unended.discard(job_id)
            return
        job: dict[str, Any] = answer.json()
        if job["status"] in ENDED:
            self._unended.discard(job_id)
            return
        command = self._next_command(job)
        if command is not None:
            self._command(job_id, command)

    def _next_command(self, job: dict[str, Any]) -> str | None:
        order, done = self.accepted[job["id"]], self.obeyed.get(job["id"], [])
        if job["status"] == "paused":  # for a full disk: it goes on by itself
            return "resume" if job["status_reason"] == StatusReason.PAUSED_BY_USER else None
        if order.command is None or order.command in done:
            return None
        step = (job["progress"] or {}).get("step") or 0
        return order.command if step >= order.after_step else None

    def _command(self, job_id: str, command: str) -> None:
        answer = self.ask("POST", f"/v1/jobs/{job_id}/{command}")
        if answer is None:
            return
        if answer.status_code == 202:
            self.obeyed.setdefault(job_id, []).append(command)
        elif answer.status_code != 409:  # 409: it has moved on since it was asked for
            self.refused.append(f"{command} of {job_id} was answered {answer.status_code}: {answer.text}")
            self.obeyed.setdefault(job_id, []).append(command)


def upload(server: ServerProcess, content: bytes) -> str:
    """The id of an uploaded text."""
    with server.http() as http:
        answer = http.post("/v1/files", files={"file": ("text.txt", content)}, data={"purpose": "dataset"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])
