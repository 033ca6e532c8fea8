"""The form for a new job: its fields, generated from the spec's model, and the spec that a filled-in form describes.

The first part of the form asks for model, data and method. Every other field of the spec is in a group below it; an
empty field is left out of the spec, so the documented default applies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

from zeta_core.contract.errors import ErrorDetail, InvalidRequest
from zeta_core.contract.spec.job_spec import JobSpec

Kind = Literal["text", "number", "choice"]

GROUPS: dict[str, tuple[str, ...]] = {
    "Length and batch": ("max_steps", "seq_len", "batch_size", "gradient_accumulate_every", "pack", "overlong"),
    "Data": ("train_on", "tokenizer", "chat_template", "use_pretokenized", "eval_dataset", "group_by"),
    "Optimization": (
        *("learning_rate", "lr_scheduler", "lr_min", "warmup_steps", "optimizer", "optimizer_states"),
        "bf16_weights",
        *("weight_decay", "max_grad_norm"),
        *("seed", "freeze", "dpo.beta", "dpo.loss", "kto.beta", "kto.desirable_weight", "kto.undesirable_weight"),
        "orpo.beta",
    ),
    "LoRA adapter": (
        *("lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "lora.modules_to_save"),
        "lora.target_parameters",
        *("lora.save_merged", "lora.use_rslora", "lora.use_dora", "lora.continue_adapter"),
    ),
    "Evaluation and checkpoints": (
        *("eval_split", "eval_steps", "early_stopping_patience", "checkpointing_steps", "save_total_limit"),
        "report_to",
    ),
    "Speed and memory": (
        *(
            "mixed_precision",
            "use_activation_checkpointing",
            "use_fsdp",
            "fsdp_shards",
            "fsdp_keep_gradients",
            "fsdp_cpu_offload",
            "use_deepspeed",
            "compile",
            "deterministic",
        ),
        *("resources.gpus", "resources.nodes", "resources.processes", "resources.exact"),
        *("elastic.min_nodes", "elastic.max_nodes"),
    ),
    "Job": (
        *("priority", "max_retries", "time_limit_seconds", "metadata", "notify", "output_dir"),
        "resume_from_checkpoint",
    ),
}
SIMPLE = ("entity_name", "model", "dataset", "method", "lora", "lora.quantize", "epochs", "resources")
METHODS = {
    "lora": "LoRA adapter: small and fast, needs the least memory",
    "qlora": "QLoRA: a LoRA adapter on a base in 4 bits",
    "full": "Full fine-tuning: changes all weights",
    "dpo": "Preferences (DPO): pairs of a chosen and a rejected answer",
    "kto": "Preferences (KTO): single answers, labeled as desirable or not",
    "orpo": "Preferences (ORPO): pairs of answers, without a reference model",
}


@dataclass(frozen=True)
class FormField:
    """A field of the spec: its dotted ``name``, how it is entered, its meaning, and what an empty one stands for."""

    name: str
    kind: Kind
    choices: tuple[str, ...]
    help: str
    unset: str


@cache
def groups() -> dict[str, list[FormField]]:
    """The fields below the first part of the form, by group; a field without a group is in the last one."""
    fields = {field.name: field for field in _all_fields()}
    grouped = {group: [fields.pop(name) for name in names if name in fields] for group, names in GROUPS.items()}
    rest = [field for name, field in fields.items() if name not in SIMPLE]
    return {**grouped, "More": rest} if rest else grouped


def _all_fields() -> Iterator[FormField]:
    schema = JobSpec.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    nested = {"lora": "Lora", "dpo": "Dpo", "kto": "Kto", "orpo": "Orpo", "resources": "Resources"}
    for name, field in schema["properties"].items():
        if name in nested:
            for part, inner in definitions[nested[name]]["properties"].items():
                yield _field(f"{name}.{part}", inner)
        else:
            yield _field(name, field)


def _field(name: str, schema: Mapping[str, Any]) -> FormField:
    options: list[dict[str, Any]] = schema.get("anyOf") or [dict(schema)]
    types = {str(option.get("type", "object")) for option in options} - {"null"}
    choices = tuple(str(choice) for option in options for choice in option.get("enum", [option.get("const")]) if choice)
    meaning, _, unset = str(schema.get("description", "")).partition("; unset: ")
    if not unset and schema.get("default") is not None:
        unset = json.dumps(schema["default"])
    if types == {"boolean"} or (choices and types == {"boolean", "string"}):
        unset = {"true": "yes", "false": "no"}.get(unset, unset)
        return FormField(name, "choice", ("true", "false", *choices), meaning, unset)
    if choices and types == {"string"}:
        return FormField(name, "choice", choices, meaning, unset.strip('"'))
    return FormField(name, "number" if types <= {"integer", "number"} else "text", (), meaning, unset)


def spec_of(form: Mapping[str, str]) -> dict[str, Any]:
    """The spec that a form describes. Raises `InvalidRequest` for a field that can't be read."""
    spec: dict[str, Any] = {}
    if name := form.get("entity_name", "").strip():
        spec["entity_name"] = name
    spec |= {"model": _model(form), "dataset": _dataset(form)}
    spec = {field: value for field, value in spec.items() if value not in (None, "")}
    method = form.get("method", "full")
    if isinstance(spec.get("model"), dict) and "config" in spec["model"]:
        method = "full"
    if method in ("lora", "qlora"):
        spec["lora"] = {"quantize": "nf4"} if method == "qlora" else {}
    elif method in ("dpo", "kto", "orpo"):
        spec["method"] = method
    if epochs := form.get("epochs", "").strip():
        spec["epochs"] = _value(epochs)
    for field in (field for fields in groups().values() for field in fields):
        text = form.get(f"field.{field.name}", "").strip()
        if text:
            _put(spec, field.name, text if field.kind == "choice" and field.choices[0] != "true" else _value(text))
    return spec


def _model(form: Mapping[str, str]) -> Any:
    kind = form.get("model_kind", "hub")
    text = form.get(f"model_{kind}", "").strip()
    if not text:
        return None
    if kind == "config":
        return {"config": _object(text, "model_config")}
    return text if kind == "hub" else {kind: text}


def _dataset(form: Mapping[str, str]) -> Any:
    kind = form.get("data_kind", "file")
    if kind == "builtin":
        return {"builtin": "python-docs"}
    text = form.get(f"data_{kind}", "").strip()
    return {kind: text} if text else None


def _value(text: str) -> Any:
    """A number, true, false, a list or an object as in JSON; any other text is a string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _object(text: str, param: str) -> dict[str, Any]:
    value = _value(text)
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    message = f'{param} is {text[:60]!r}, which is not a JSON object; write for example {{"model_type": "llama"}}.'
    detail = ErrorDetail(param=param, message=message, code="invalid_value")
    raise InvalidRequest(message, param=param, details=[detail])


def _put(spec: dict[str, Any], name: str, value: Any) -> None:
    """Set a field by its dotted name."""
    outer, _, inner = name.partition(".")
    if not inner:
        spec[outer] = value
        return
    existing = spec.get(outer)
    spec[outer] = {**(cast("dict[str, Any]", existing) if isinstance(existing, dict) else {}), inner: value}
