"""Summarizing the losses of an evaluation, and storing them as the checkpoint ``final``."""

from __future__ import annotations

from pathlib import Path

from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.training_state import perplexity
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, Manifest, ManifestFile
from zeta_core.contract.job.comparison import MIN_DOCUMENTS, compare
from zeta_core.contract.job.evaluation import (
    DOCUMENTS_FILE,
    RESULT_FILE,
    DocumentResult,
    EvaluationResult,
    ModelScores,
)
from zeta_core.contract.job.events import CheckpointLine, utc_now
from zeta_core.evaluations.run import Measured
from zeta_core.report.reporter import Reporter


def summarize(measured: list[Measured]) -> EvaluationResult:
    """The result of the checkpoint alone, or of the checkpoint and its base."""
    losses = [each.losses for each in measured]
    scores = [_scores(each) for each in measured]
    has_base = len(measured) > 1
    return EvaluationResult(
        num_documents=len(losses[0].documents),
        num_tokens=sum(losses[0].num_targets),
        checkpoint=scores[0],
        base=scores[1] if has_base else None,
        comparison=compare(*losses) if has_base and len(losses[0].documents) >= MIN_DOCUMENTS else None,
    )


def save(
    result: EvaluationResult,
    measured: list[Measured],
    locations: list[str],
    report: Reporter,
    *,
    job_id: str,
    output_dir: Path,
) -> None:
    """Publish the result and the losses of each document, and report the checkpoint. Raises `OSError`."""
    part = checkpoint_files.begin_checkpoint(output_dir, FINAL_CHECKPOINT)
    (part / RESULT_FILE).write_text(result.model_dump_json(indent=2) + "\n")
    with (part / DOCUMENTS_FILE).open("w", encoding="utf-8") as file:
        for document in _documents(measured, locations):
            file.write(document.model_dump_json(exclude_none=True) + "\n")

    def manifest(files: list[ManifestFile]) -> Manifest:
        return Manifest(
            run_id=job_id,
            name=FINAL_CHECKPOINT,
            format="results",
            step=0,
            tokens=result.num_tokens,
            metrics={"eval_loss": result.checkpoint.loss},
            created_at=utc_now(),
            files=files,
        )

    published = checkpoint_files.publish_checkpoint(part, output_dir, manifest)
    report.write(
        CheckpointLine(name=FINAL_CHECKPOINT, step=0, metrics=published.manifest.metrics, bytes=published.size_bytes)
    )


def _scores(measured: Measured) -> ModelScores:
    loss = measured.losses.mean_loss
    return ModelScores(loss=loss, perplexity=perplexity(loss), token_accuracy=measured.token_accuracy)


def _documents(measured: list[Measured], locations: list[str]) -> list[DocumentResult]:
    means = [
        [loss / count for loss, count in zip(each.losses.losses, each.losses.num_targets, strict=True)]
        for each in measured
    ]
    return [
        DocumentResult(
            location=location,
            num_tokens=measured[0].losses.num_targets[number],
            loss=means[0][number],
            base_loss=means[1][number] if len(means) > 1 else None,
        )
        for number, location in enumerate(locations)
    ]
