"""`zeta submit` and `zeta validate`: build a spec from a file and options, after uploading local files."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from zeta.cli.app import JOBS, AsJson, app

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
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Set a field of the spec, such as learning_rate=1e-4. Repeatable."
    ),
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
    from zeta.cli.output import notice, print_json, print_text
    from zeta.client import Client

    fields = read_fields(spec, model, data, lora, settings or [])
    with Client() as client:
        job = client.submit(fields, on_upload=partial(notice, as_json=as_json))
        if as_json:
            print_json(job)
        else:
            print_text(f"{job.id} is {job.status}." + ("" if follow else f" Follow it: zeta wait {job.id}"))
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
    """Check a job and its data, and estimate its cost.

    The job is not submitted, but local files are uploaded. A worker checks every row of the data. The estimate includes
    the number of parameters and steps, memory, disk space and time.
    """
    from zeta.cli.estimate_display import estimate_rows
    from zeta.cli.output import notice, print_fields, print_json
    from zeta.client import Client

    fields = read_fields(spec, model, data, lora, settings or [])
    with Client() as client:
        estimate = client.validate(fields, on_upload=partial(notice, as_json=as_json))
    if as_json:
        print_json(estimate)
        return
    print("The job is valid.")
    print_fields(estimate_rows(estimate))


def read_fields(
    file: Path | None, model: str | None, data: str | None, lora: bool, settings: list[str]
) -> dict[str, Any]:
    """The spec in the file or on standard input, with the options applied. Raises `InvalidRequest`."""
    from zeta.local_files import shown_path
    from zeta.spec_file import MAX_BYTES, apply_settings, looks_like_data, read_spec
    from zeta_core.contract.errors import InvalidRequest

    if file is None:
        fields: dict[str, Any] = {}
        if model is None and data is None and not settings:
            raise InvalidRequest("No job was given; name a spec file, or use --model and --data.")
    elif str(file) == "-":
        fields = read_spec(Path("standard input"), sys.stdin.buffer.read(MAX_BYTES + 1))
    else:
        if looks_like_data(file):
            name = shown_path(file)
            raise InvalidRequest(f"{name} looks like data; use --data {name}.", code="invalid_spec_file")
        fields = read_spec(file)
    if model is not None:
        fields["model"] = model
    if data is not None:
        fields["dataset"] = data
    if lora:
        fields["lora"] = fields.get("lora") or {}
    return apply_settings(fields, settings)
