"""Answering all requests of a batch with one model, with the generation of `zeta_core.serve`.

Up to `MAX_OPEN` requests are computed together. A request that the model can't answer, because it does not fit into the
context for example, gets a line in the error file and does not end the batch. The run saves its results every
`SAVE_SECONDS`, and when it must stop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from zeta_core.batches.results import RESULTS_FILE, Results
from zeta_core.checkpoint import checkpoint_files
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, Manifest, ManifestFile
from zeta_core.contract.job.events import CheckpointLine, ProgressLine, utc_now
from zeta_core.contract.job.job import JobResult
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.openai.answer_objects import AnswerObject
from zeta_core.contract.openai.batch_files import BatchRequest, answer_line, failure_line
from zeta_core.contract.spec.batch_spec import BatchSpec
from zeta_core.contract.wire.answers import Generate, Generated
from zeta_core.report.reporter import Reporter
from zeta_core.serve.generation import Generation
from zeta_core.serve.loading import LoadedModel

MAX_OPEN = 64  # requests that are given to the model at the same time
PROGRESS_SECONDS = 2.0
SAVE_SECONDS = 60.0
SAVE_SHARE = 0.05  # the largest share of the time that is spent on saving


class BatchRun:
    """One attempt at a batch. ``job_id`` makes the ids of its results unique."""

    def __init__(
        self,
        spec: BatchSpec,
        requests: list[BatchRequest],
        loaded: LoadedModel,
        report: Reporter,
        *,
        job_id: str,
        run_dir: Path,
        output_dir: Path,
    ) -> None:
        self._spec = spec
        self._requests = requests
        self._report = report
        self._job_id = job_id
        self._output_dir = output_dir
        self._results = Results(run_dir / RESULTS_FILE)
        self._generation = Generation(loaded, self._receive)
        self._waiting: deque[BatchRequest] = deque()
        self._open: dict[str, tuple[BatchRequest, AnswerObject]] = {}
        self._num_saved = -1  # results in the newest checkpoint

    def answer(self, earlier: Path | None, stop: Callable[[], StopAction | None]) -> StopAction | None:
        """Answer all requests that have no result in the checkpoint ``earlier``, and save the results.

        Returns the action if ``stop`` ended the run. Raises `OSError`.
        """
        with closing(self._results):
            if earlier is not None:
                self._results.load(earlier)
                self._num_saved = self._results.counts.num_results
            self._waiting.extend(request for request in self._requests if request.row not in self._results)
            action = self._answer_waiting(stop)
            if action is None:
                self._save(FINAL_CHECKPOINT, self._results.write_final)
            else:  # also if the batch was cancelled: its answers are kept
                self._save_partial()
            return action

    @property
    def result(self) -> JobResult:
        return JobResult.model_validate(self._results.counts.model_dump())

    def _answer_waiting(self, stop: Callable[[], StopAction | None]) -> StopAction | None:
        progress_at = 0.0
        save_at = time.monotonic() + SAVE_SECONDS
        while self._waiting or self._open:
            if (action := stop()) is not None:
                return action
            while self._waiting and len(self._open) < MAX_OPEN:
                self._begin(self._waiting.popleft())
            self._generation.step()
            now = time.monotonic()
            if now >= progress_at:
                progress_at = now + PROGRESS_SECONDS
                self._report_progress()
            if now >= save_at:
                self._save_partial()
                save_seconds = time.monotonic() - now
                save_at = time.monotonic() + max(SAVE_SECONDS, save_seconds / SAVE_SHARE)
        self._report_progress()
        return None

    def _begin(self, request: BatchRequest) -> None:
        request_id = str(request.row)
        self._open[request_id] = request, AnswerObject(request.query, self._spec.fingerprint)
        self._generation.add(
            Generate(request_id=request_id, prompt=request.query.prompt, options=request.query.options)
        )

    def _receive(self, generated: Generated) -> None:
        request, answer = self._open[generated.request_id]
        answer.prompt_tokens = generated.prompt_tokens or answer.prompt_tokens
        for piece in generated.pieces:
            answer.add(piece)
        if not generated.is_last:
            return
        del self._open[generated.request_id]
        if generated.failure is not None:
            line = failure_line(self._job_id, request, generated.failure)
            self._results.add(request.row, line, is_failure=True, prompt_tokens=0, completion_tokens=0)
            return
        whole = answer.whole()
        self._results.add(
            request.row,
            answer_line(self._job_id, request, whole),
            is_failure=False,
            prompt_tokens=whole["usage"]["prompt_tokens"],
            completion_tokens=whole["usage"]["completion_tokens"],
        )

    def _report_progress(self) -> None:
        counts = self._results.counts
        self._report.write(
            ProgressLine(
                phase="answering",
                step=counts.num_results,
                total_steps=len(self._requests),
                num_failed=counts.num_failed,
                tokens=counts.prompt_tokens + counts.completion_tokens,
            )
        )

    def _save_partial(self) -> None:
        if self._results.counts.num_results > self._num_saved:
            self._save(f"step-{self._results.counts.num_results}", self._results.write_partial)

    def _save(self, name: str, write: Callable[[Path], None]) -> None:
        """Publish a checkpoint, then report it. Raises `OSError`."""
        counts = self._results.counts
        part = checkpoint_files.begin_checkpoint(self._output_dir, name)
        write(part)

        def manifest(files: list[ManifestFile]) -> Manifest:
            return Manifest(
                run_id=self._job_id,
                name=name,
                format="results",
                step=counts.num_results,
                tokens=counts.prompt_tokens + counts.completion_tokens,
                metrics={metric: float(value) for metric, value in counts.model_dump().items()},
                created_at=utc_now(),
                files=files,
            )

        published = checkpoint_files.publish_checkpoint(part, self._output_dir, manifest)
        self._num_saved = counts.num_results
        self._report.write(
            CheckpointLine(
                name=name, step=counts.num_results, metrics=published.manifest.metrics, bytes=published.size_bytes
            )
        )
