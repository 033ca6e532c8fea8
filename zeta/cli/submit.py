"""`zeta submit` and `zeta validate`: build a spec from a file and options, after uploading local files."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zeta.cli.app import JOBS, AsJson, app

if TYPE_CHECKING:
    from zeta_core.contract.check import CheckedData

SpecFile = Annotated[
    Path | None,
    typer.Argument(metavar="[SPEC.yaml|json]", help="The job spec as YAML 1.2 or JSON; - reads standard input."),
]
Model = Annotated[
    str | None,
    typer.Option(help="A Hub id; a local folder, .tar, .gguf or config.json; job_...[/step-N], or @last."),
]
Data = Annotated[
    str | None,
    typer.Option(help="A local file or folder, hub:OWNER/NAME, path:GLOB (on the workers), or python-docs."),
]
Lora = Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter instead of all weights.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="K.L=V", help="Set a field of the spec, such as learning_rate=1e-4. Repeatable."),
]


@app.command(rich_help_panel=JOBS)
def submit(
    spec: SpecFile = None,
    model: Model = None,
    data: Data = None,
    lora: Lora = False,
    settings: Settings = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the job until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a training job. Local files are uploaded first."""
    from zeta.cli.follow import follow as follow_job
    from zeta.cli.output import notice, print_json
    from zeta.client import Client

    wanted = _read(spec, model, data, lora, settings or [])
    with Client() as client:
        job = client.submit(wanted, on_upload=partial(notice, as_json=as_json))
        if as_json:
            print_json(job)
        else:
            print(f"{job.id} is {job.status}." + ("" if follow else f" Follow it: zeta wait {job.id}"), flush=True)
        if follow:
            raise typer.Exit(follow_job(client, job.id, as_json=as_json))


@app.command(rich_help_panel=JOBS)
def validate(
    spec: SpecFile = None,
    model: Model = None,
    data: Data = None,
    lora: Lora = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a job and the rows of its data, and estimate its cost, without submitting it.

    Local files are uploaded first. A worker reads all rows. Estimates include the number of parameters and steps,
    memory, disk space and time.
    """
    from zeta.cli.output import duration, notice, print_fields, print_json, size
    from zeta.client import Client

    wanted = _read(spec, model, data, lora, settings or [])
    with Client() as client:
        found = client.validate(wanted, on_upload=partial(notice, as_json=as_json))
    if as_json:
        print_json(found)
        return
    memory = None if found.memory is None else f"{size(found.memory.bytes)} {found.memory.meaning}"
    disk = None if found.disk is None else f"{size(found.disk.bytes)} {found.disk.meaning}"
    time = None if found.time is None else f"{duration(found.time.seconds)} {found.time.meaning}"
    steps = f"{found.steps} (counted by {found.counted_by} on the same data)" if found.counted_by else found.steps
    known: dict[str, object] = {
        "data": None if found.data is None else _data_in_words(found.data),
        "parameters": found.parameters,
        "trainable_parameters": found.trainable_parameters,
        "steps": steps,
        "tokens": found.tokens,
        "memory": memory,
        "disk": disk,
        "time": time,
    }
    print("The job is valid.")
    print_fields(
        [
            (name.replace("_", " "), value or f"not known yet: {found.pending.get(name, '')}")
            for name, value in known.items()
        ]
    )


def _data_in_words(data: CheckedData) -> str:
    """The checked rows in one line."""
    rows = "1 row" if data.rows == 1 else f"{data.rows:,} rows"
    kind = ", ".join(data.shapes or data.formats)
    text = f"{rows} ({kind}), about {data.tokens:,} tokens, {data.trained_share:.0%} of them trained on"
    if data.too_long_share:
        text += f"; {data.too_long_share:.0%} of documents exceed seq_len"
    if data.unused_columns:
        text += f"; columns not used: {', '.join(data.unused_columns)}"
    return text if data.note is None else f"{text}. {data.note}"


def _read(file: Path | None, model: str | None, data: str | None, lora: bool, settings: list[str]) -> dict[str, Any]:
    from zeta.spec_file import MAX_BYTES, apply_settings, read_spec
    from zeta_core.contract.errors import InvalidRequest

    if file is None:
        wanted: dict[str, Any] = {}
        if model is None and data is None and not settings:
            raise InvalidRequest("No job was given; name a spec file, or use --model and --data.")
    elif str(file) == "-":
        wanted = read_spec(Path("standard input"), sys.stdin.buffer.read(MAX_BYTES + 1))
    else:
        wanted = read_spec(file)
    if model is not None:
        wanted["model"] = model
    if data is not None:
        wanted["dataset"] = data
    if lora:
        wanted["lora"] = wanted.get("lora") or {}
    return apply_settings(wanted, settings)
