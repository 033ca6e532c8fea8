"""`zeta eval`: evaluate a checkpoint of a job on a file, alone or compared with its base model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zeta.cli.app import JOBS, AsJson, JobId, app

if TYPE_CHECKING:
    from zeta_core.contract.job.evaluation import EvaluationResult, ModelScores


@app.command("eval", rich_help_panel=JOBS)
def evaluate(
    job_id: JobId,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A data file in a format that training reads.")],
    checkpoint: Annotated[
        str, typer.Option(help="The checkpoint to evaluate: step-N, best, final or latest.")
    ] = "final",
    base: Annotated[bool, typer.Option("--base", help="Compare with the model that the job started from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint on a file.

    The file is uploaded, and read, rendered and masked as the training data of the job. The interval of a comparison
    contains the differences that are plausible with other documents of the same kind (95 %, a paired bootstrap). If it
    contains 0, the models can't be distinguished.
    """
    from zeta.cli.exit_status import ExitStatus
    from zeta.cli.follow import follow
    from zeta.cli.output import print_text
    from zeta.cli.progress_bars import upload_progress
    from zeta.client import Client
    from zeta.job_ids import resolve_job_id

    with Client() as client:
        job = resolve_job_id(client, job_id)
        with upload_progress(sys.stderr) as on_bytes:
            stored = client.upload(file, on_bytes=on_bytes)
        evaluation = client.evaluate(job, stored.id, checkpoint=checkpoint, base=base)
        status = follow(client, evaluation.id, as_json=as_json)
        if status != ExitStatus.SUCCEEDED:
            raise typer.Exit(status)
        result = client.job(evaluation.id).result
    if not as_json and result is not None and result.evaluation is not None:
        for line in result_lines(result.evaluation):
            print_text(line)


def result_lines(result: EvaluationResult) -> list[str]:
    """The scores, one model per line, and the comparison."""
    documents = "document" if result.num_documents == 1 else "documents"
    lines = [
        f"{result.num_documents:,} {documents}, {result.num_tokens:,} predicted tokens",
        f"checkpoint  {_scores(result.checkpoint)}",
    ]
    if result.base is None:
        return lines
    lines.append(f"base        {_scores(result.base)}")
    found = result.comparison
    if found is None:
        return [*lines, "There are too few documents to tell a difference from noise."]
    lines.append(f"checkpoint - base = {found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f})")
    if found.better is None:
        return [*lines, "The models are not distinguishable on these documents."]
    return [*lines, "The checkpoint is better." if found.better == "a" else "The base is better."]


def _scores(scores: ModelScores) -> str:
    from zeta_core.contract.job.events import describe_perplexity

    words = f"held-out loss {scores.loss:.4f}  perplexity {describe_perplexity(scores.perplexity)}"
    return words if scores.token_accuracy is None else f"{words}  token accuracy {scores.token_accuracy:.2%}"
