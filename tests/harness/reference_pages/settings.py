"""docs/settings.md: every environment variable that a program of the service reads, from the classes of settings.

In a description, the text after ``default:`` states the effect of an unset variable; it becomes the column "default".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from pydantic.fields import FieldInfo

from server.settings import ServerSettings
from tests.harness.reference_pages.markdown import cell, generated, table
from worker.settings import WorkerSettings
from zeta.server_lookup import ClientSettings
from zeta.up.settings import UpSettings
from zeta_core.system.settings import PREFIX, Settings

HEAD = """\
# Settings

Settings are environment variables, which each program reads once when it starts. `zeta up` passes its environment on
to the server and the worker that it starts, so their settings apply to it, too.

- Names that end in `_SECONDS` are durations in seconds, and those in `_BYTES` are integers, without a unit. `yes` and
  `no` turn a setting on and off. An empty variable counts as unset.
- A secret can also be read from a file: `ZETA_API_KEY_FILE` is the path of a file whose first line is the key.
- A value that is not allowed is an error that names the variable, the value and what is allowed.
- `zeta config` prints the settings of the client and of `zeta up`, and all other `ZETA_*` variables that are set, with
  secrets masked.
"""

READERS: Mapping[str, type[Settings]] = {
    "server": ServerSettings,
    "worker": WorkerSettings,
    "client": ClientSettings,
    "`zeta up`": UpSettings,
}
READERS_OF_MEANINGS = {"server", "worker", "client"}  # a setting has the same meaning for `zeta up`
NOT_PREFIXED = {"cuda_visible_devices": "CUDA_VISIBLE_DEVICES"}
SECTIONS: Mapping[str, set[str]] = {  # the readers, apart from `zeta up`
    "All programs": {"server", "worker", "client"},
    "Server and client": {"server", "client"},
    "Client": {"client"},
    "Server and workers": {"server", "worker"},
    "Server": {"server"},
    "Worker": {"worker"},
}
DETAILS = {
    "artifacts_url": "how-to/object-storage.md",
    "downloads": "how-to/object-storage.md",
    "worker_secret": "security.md#workers",
    "project_hub": "security.md#the-hugging-face-hub",
    "project_max_running": "security.md#limits-of-a-project",
    "openai_models": "openai.md",
    "webhook_networks": "webhooks.md",
    "gguf_python": "export.md#the-gguf-converter",
    "sandbox": "security.md#sandbox",
    "worker_address": "how-to/several-hosts.md#one-job-on-several-machines",
}

OTHER = """\
## Variables of other programs and libraries

| variable | read by | meaning |
|---|---|---|
| `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY` | client | proxy to the server; this machine is always reached directly. SOCKS needs `pip install socksio` |
| `SSL_CERT_FILE`, `SSL_CERT_DIR` (else `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE`) | client | your own certificate authorities; default: those of certifi and the system |
| `NO_COLOR`, `TERM`, `COLUMNS` | client | no colours; `TERM=dumb`: no progress bars; the width of the output |
| `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, ... | server, worker | address of a store other than AWS, and the credentials for `s3://`, as boto3 reads them; jobs don't get them |
| `HF_TOKEN`, `HF_HOME` | worker, `Trainer` | the token for the Hub, which only jobs of projects with `hub=operator-token` get ([security.md](security.md#the-hugging-face-hub)), and the folder of the Hub's cache; `hf auth login` works as well |
| `OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) | server | exports traces to this OpenTelemetry collector ([monitoring](operations/monitoring.md#traces)); the other `OTEL_*` variables have their usual effect; default: no traces |
| `ATEN_CPU_CAPABILITY`, `MKL_CBWR`, `DNNL_MAX_CPU_ISA`, ... | worker, `Trainer` | select the kernels of a run and are part of its device kind; `GET /v1/workers` shows the kinds |
"""  # noqa: E501 - rows of a table


class Description(NamedTuple):
    """The meaning of a setting for one reader, and its default."""

    meaning: str
    default: str


def settings_page() -> str:
    parts = [HEAD, generated("the settings classes, such as server/settings.py")]
    for title, readers in SECTIONS.items():
        rows = [_row(name) for name in _names() if set(_descriptions(name)) - {"`zeta up`"} == readers]
        parts += [f"## {title}\n", table(("setting", "default", "meaning"), rows)]
    return "\n".join([*parts, OTHER])


def undescribed() -> list[str]:
    """The settings without a meaning."""
    return [name for name in _names() if not any(found.meaning for found in _descriptions(name).values())]


def _names() -> Iterator[str]:
    """The names of all fields, each once, in the order of the classes."""
    yield from dict.fromkeys(name for settings in READERS.values() for name in settings.model_fields)


def _descriptions(name: str) -> dict[str, Description]:
    """The description of a setting by the programs that read it."""
    return {
        reader: _description(name, settings.model_fields[name])
        for reader, settings in READERS.items()
        if name in settings.model_fields
    }


def _description(name: str, field: FieldInfo) -> Description:
    text = field.description or ""
    if text.startswith("default: "):
        text = f"; {text}"
    meaning, _, unset = text.partition("; default: ")
    return Description(meaning, unset or ("" if field.is_required() else _shown(name, field.default)))


def _row(name: str) -> tuple[str, str, str]:
    found = _descriptions(name)
    variable = NOT_PREFIXED.get(name, PREFIX + name.upper())
    meanings = {reader: description.meaning for reader, description in found.items() if reader in READERS_OF_MEANINGS}
    meaning = _joined(meanings)
    details = f" ([details]({DETAILS[name]}))" if name in DETAILS else ""
    defaults = {reader: description.default or "required" for reader, description in found.items()}
    return f"`{variable}`", cell(_joined(defaults)), cell(meaning) + details


def _joined(texts: dict[str, str]) -> str:
    """The text of the first reader, and those of other readers that differ from it."""
    first = next(iter(texts.values()))
    others = [f"{reader}: {text}" for reader, text in texts.items() if text != first]
    return "; ".join([first, *others])


def _shown(name: str, value: object) -> str:
    """A default value as a user would write it, or with a unit."""
    match value:
        case None | "" | ():
            return "none"
        case bool():
            return "`yes`" if value else "`no`"
        case int() if name.endswith("_bytes"):
            unit, size = next(
                (unit, size) for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if value >= size
            )
            return f"{value // size} {unit}"
        case int() | float():
            return f"{value:,g}" if isinstance(value, float) else f"{value:,}" if name != "port" else str(value)
        case StrEnum() | Path() | str():
            return f"`{value}`"
        case _:
            raise TypeError(f"{name} has the default {value!r}, which has no form on this page")
