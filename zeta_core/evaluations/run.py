"""Measuring models on the documents of a file, which are read, rendered and masked as in the training of the job.

The models are loaded one after the other, as for answers (`zeta_core.serve.loading`): on a CPU they are computed in
float32, and on a GPU in the precision of their weights. The base of an adapter that was trained on it in 4 bits is
quantized as well. All of them get the same tokens: those of the checkpoint's tokenizer.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from zeta_core.contract.job.comparison import DocumentLosses
from zeta_core.contract.job.events import ProgressLine
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.evaluation_spec import EvaluationSpec
from zeta_core.contract.wire.answers import ServedWeights, ServeFile
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.data.row_check import check_rows
from zeta_core.data.sequences import Sequences
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.environment import ProcessRank
from zeta_core.failures import InvalidData, NonFiniteLoss
from zeta_core.model.inspection import check_positions, embedding_rows
from zeta_core.objective.document_losses import DocumentEvaluator
from zeta_core.objective.loss_probe import find_loss_function
from zeta_core.parallel.processes import Processes
from zeta_core.report.reporter import Reporter
from zeta_core.run.decision import choose_sample_ids
from zeta_core.serve.loading import LoadedModel, load

PROGRESS_SECONDS = 2.0
MAX_CHECK_SECONDS = 120.0


@dataclass(frozen=True)
class Measured:
    """The losses of one model on the documents, and its token accuracy if it returns logits."""

    losses: DocumentLosses
    token_accuracy: float | None


class EvaluationRun:
    """One attempt at an evaluation."""

    def __init__(
        self, spec: EvaluationSpec, file: RunFile, report: Reporter, stop: Callable[[], StopAction | None]
    ) -> None:
        self._spec, self._file, self._report, self._stop = spec, file, report, stop
        self._num_models = 1 if spec.base is None else 2
        self._progress_at = 0.0
        self.locations: list[str] = []  # of each measured document: its file and row

    def measure(self) -> list[Measured] | StopAction:
        """Measure the checkpoint, and then its base if the spec names one; or the action if a stop was requested.

        Raises `InvalidData` naming faulty rows, `InvalidModel`, `NonFiniteLoss`, and `WeightsReplaced`.
        """
        self._report.phase("loading_model")
        loaded = load(self._serve_file(self._checkpoint()))
        self._report.phase("loading_data")
        tokens = self._read_tokens(loaded.tokenizer)
        measured: list[Measured] = []
        for number in range(self._num_models):
            if number:
                del loaded  # there may be no memory for both models
                gc.collect()
                torch.cuda.empty_cache()
                self._report.phase("loading_model")
                loaded = load(self._serve_file(self._base()))
            found = self._measure_model(loaded, tokens, number)
            if not isinstance(found, Measured):
                return found
            measured.append(found)
        return measured

    def _read_tokens(self, tokenizer: Any) -> TokenFile:
        """The documents of the file, after a check of all rows. Raises `InvalidData`."""
        file, spec = self._file, self._spec
        locations = SourceLocations.of_run(file)
        sources = open_sources([spec.dataset], locations, pretokenized=spec.use_pretokenized)
        cache = file.cache
        today = spec.template_date or datetime.now(UTC).date()
        if all(source.flat is None for source in sources):
            check_rows(
                [source.with_format() for source in sources],
                tokenizer,
                cache,
                train_on=spec.train_on,
                method="sft",
                today=today,
                seconds=MAX_CHECK_SECONDS,
            )
        return prepare_tokens(
            sources,
            tokenizer,
            cache,
            self._report,
            train_on=spec.train_on,
            today=today,
            processes=torch.get_num_threads(),
        )

    def _measure_model(self, loaded: LoadedModel, tokens: TokenFile, number: int) -> Measured | StopAction:
        """Measure the model with this number, from 0."""
        model = loaded.model
        rows = embedding_rows(model)
        if rows is not None and tokens.largest_id >= rows:
            name = "The base model" if number else "The checkpoint"
            raise InvalidData(
                f"{name} has embeddings for {rows} tokens, but the documents contain token {tokens.largest_id}; "
                "evaluate it with documents of its own vocabulary."
            )
        check_positions(model, self._spec.seq_len)
        loss_function = find_loss_function(
            model, sample_ids=choose_sample_ids(tokens), largest_id=tokens.largest_id, vocab_size=rows
        )
        parts = Sequences(tokens, self._spec.seq_len, pack=False, overlong=self._spec.overlong)
        with closing(Processes(ProcessRank(), need_group=False)) as processes:
            evaluator = DocumentEvaluator(tokens, parts, loss_function, processes, loaded.device, all_documents=True)

            def on_documents(num_done: int) -> None:
                self._report_progress(number, num_done, tokens.num_documents)

            with torch.no_grad():
                losses = evaluator.evaluate(model, 0, self._stop, on_documents)
            if not isinstance(losses, DocumentLosses):
                return losses
            if not losses.documents:
                raise InvalidData("The file contains no document with a token to predict; provide more text.")
            if not all(map(math.isfinite, losses.losses)):
                raise NonFiniteLoss("The loss on a document is not finite; the weights are damaged or have diverged.")
            sums = loss_function.take_sums()
            accuracy = loss_function.metrics(None if sums is None else processes.sum(sums)).token_accuracy
        self.locations = [tokens.location(document) for document in evaluator.measured]
        return Measured(losses, accuracy)

    def _report_progress(self, number: int, num_done: int, num_documents: int) -> None:
        now = time.monotonic()
        if now < self._progress_at:
            return
        self._progress_at = now + PROGRESS_SECONDS
        share = (number + num_done / num_documents) / self._num_models
        self._report.write(ProgressLine(phase="evaluating", documents=num_done, share=round(share, 4)))

    # --- The weights, as a serving process loads them -----------------------------------------------------------------

    def _checkpoint(self) -> ServedWeights:
        model = self._spec.model
        return ServedWeights(
            name=f"{model.job}/{model.checkpoint}",
            project="",
            model=self._file.spec["model"],
            fingerprint=self._spec.fingerprint,
            has_manifest=True,
            quantize=self._spec.quantize,
            files=self._file.resolved_spec.files,
            bases=self._file.bases,
        )

    def _base(self) -> ServedWeights:
        base = self._file.spec["base"]
        return ServedWeights(
            name="the base model",
            project="",
            model=base,
            fingerprint=hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest(),
            quantize=self._spec.quantize,
            files=self._file.resolved_spec.files,
        )

    def _serve_file(self, weights: ServedWeights) -> ServeFile:
        file = self._file
        return ServeFile(
            weights=weights,
            artifacts_root=file.artifacts_root,
            cache_dir=str(file.cache),
            data_root=file.data_root,
            hub=file.hub,
        )
