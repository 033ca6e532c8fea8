"""Dry-runs a spec without training or weights, and checks the rows of its data.

Guarantees: no weights are fetched or read, only a config and a tokenizer. Models are built without storage, except for
a small one of the same architecture. Data is read but not stored (`zeta_core.data.row_check`). Only the caches of
configs, tokenizers and check results are written.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zeta_core.contract.errors import ErrorDetail, ZetaError
from zeta_core.contract.job.check import CheckAnswer, Vocabulary
from zeta_core.contract.spec import defaults
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.range_test import RATE_UNKNOWN
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import parse
from zeta_core.contract.wire.run_directory import RunFile
from zeta_core.failures import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn

    from zeta_core.data.row_check import CheckedRows
    from zeta_core.data.sources import SourceLocations
    from zeta_core.data.tokens.flat_files import IdType
    from zeta_core.model.located_model import LocatedModel
    from zeta_core.objective.isolation import Isolation
    from zeta_core.plan import Plan

EVAL_SHARE = 0.25  # of the time for rows is reserved for the rows of eval_dataset
DATA_UNREAD = "Unknown until the data is tokenized when training starts."
# Values of the plan that depend on the data, the device or the date, or that are not fields of the spec.
_NOT_RESOLVED = frozenset(
    {
        "global_batch",
        "warmup",
        "data",
        "eval_data",
        "total_steps",
        "total_sequences",
        "base",
        "device_kind",
        "template_date",
    }
)
_BATCH = frozenset({"batch_size", "gradient_accumulate_every", "global_batch_size"})
_PARAMS = {"invalid_model": "model", "invalid_data": "dataset"}  # the fields of errors that do not name one
_PROBE = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def check(text: str) -> CheckAnswer:
    """The answer for the contents of a file, including every error in it."""
    try:
        content = json.loads(text)
    except ValueError as error:
        return CheckAnswer(
            ok=False, details=[ErrorDetail(message=f"The file is not JSON: {error}", code="invalid_json")]
        )
    try:
        given = content.get("spec", content) if isinstance(content, dict) else content
        with tempfile.TemporaryDirectory() as scratch:
            usual = {"job_id": "check", "attempt": 0, "output_dir": scratch, "artifacts_root": scratch}
            if isinstance(content, dict) and "spec" in content:
                file = RunFile.model_validate({**usual, **cast("dict[str, Any]", content)})
                if file.shown is not None:
                    from zeta_core.dry_run.show import show_on_worker

                    return CheckAnswer(ok=True, shown=show_on_worker(file, file.shown))
            else:
                file = RunFile.model_validate({**usual, "spec": given})
            return _checked(parse(JobSpec, given), file)
    except ZetaError as error:
        if ran_out_of_memory(error):
            raise
        return CheckAnswer(ok=False, details=error_details(error))


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a failed allocation caused the error, even if libraries have wrapped it in other errors."""
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def error_details(error: ZetaError) -> list[ErrorDetail]:
    """What an answer states about an error."""
    if error.details:
        return list(error.details)
    message = " ".join((error.message, getattr(error, "hint", None) or "")).strip()
    return [ErrorDetail(param=error.param or _PARAMS.get(error.code), message=message, code=error.code)]


def _checked(spec: JobSpec, file: RunFile) -> CheckAnswer:
    from zeta_core.data.documents.template import set_template
    from zeta_core.data.sources import SourceLocations
    from zeta_core.model.continued_adapter import continued
    from zeta_core.model.inspection import check_vocabulary, embedding_rows
    from zeta_core.model.quantization import require_bitsandbytes
    from zeta_core.model.sources import locate_model
    from zeta_core.model.tokenizer import locate_tokenizer

    if spec.lora is not None and spec.lora.quantize is not None:
        require_bitsandbytes()
    locations = SourceLocations.of_run(file, fetch_weights=False)
    cache = file.cache
    located = locate_model(spec.model, locations, cache)
    if spec.lora is not None and spec.lora.continue_adapter:
        located = continued(located, spec)
    if located.needs_weights:
        unknown = ("num_parameters", "num_trained_parameters", "memory", "vocabulary", "isolates", "checkpoint_bytes")
        return CheckAnswer(
            ok=True,
            resolved_spec=defaults.resolve(spec),
            pending=dict.fromkeys(unknown, "Unknown until the model is loaded."),
        )
    tokenizer = locate_tokenizer(spec.tokenizer, located, locations, cache)
    set_template(tokenizer, spec.chat_template)
    pending: dict[str, str] = {}
    rows, largest_id, id_types = _check_rows(spec, file, locations, tokenizer, cache, pending)
    dry_run = _dry_run(spec, file, located, pending)
    for id_type in id_types:
        id_type.check(embedding_rows(dry_run.base))
    check_vocabulary(dry_run.base, largest_id, None)
    return _answer(spec, dry_run, rows, len(tokenizer), pending)


@dataclass(frozen=True)
class _DryRun:
    """The models of a run without storage, and its plan as far as the data does not determine it."""

    located: LocatedModel
    base: nn.Module
    trained: nn.Module  # the base with its adapter, if there is one
    plan: Plan
    isolates: bool | None
    isolation: Isolation | None  # the arguments of packed documents, such as masks
    on_gpu: bool
    is_from_scratch: bool
    needs_data: bool  # to decide the batch


def _dry_run(spec: JobSpec, file: RunFile, located: LocatedModel, pending: dict[str, str]) -> _DryRun:
    """Build the models and decide the plan. Adds the reasons why values are unknown to ``pending``."""
    import torch

    from zeta_core.model.existing_adapter import without_peft_wrapper
    from zeta_core.model.inspection import plan_inputs_without_data
    from zeta_core.model.preparation import prepare
    from zeta_core.objective.isolation_probe import IsolationFinding, find_isolation
    from zeta_core.plan import decide_plan, with_length

    with torch.device("meta"):
        base, trained = without_peft_wrapper(located.build()), without_peft_wrapper(located.build())
    inputs = plan_inputs_without_data(
        base,
        pretrained=located.pretrained,
        world_size=file.processes,
        device=file.device,
        supports_bf16=file.supports_bf16,
    )
    finding = IsolationFinding(None) if spec.method != "sft" else find_isolation(base, sample_ids=_PROBE)
    packs = finding.isolates is not False or finding.learns_padding
    plan = decide_plan(spec, replace(inputs, packs=packs, continued_adapter=located.continued_settings), None)
    with torch.device("meta"):
        prepare(trained, located, plan)
    if spec.max_steps is not None:
        plan = with_length(plan, spec, 1)
    else:
        pending["total_steps"] = DATA_UNREAD
    needs_data = spec.batch_size is None and not (inputs.from_scratch and plan.pack)
    if spec.max_steps is None or needs_data:
        pending["tokens"] = DATA_UNREAD
    isolates = finding.isolates if spec.pack is not False and spec.method == "sft" else None
    if isolates is None and plan.pack:
        pending["isolates"] = "Unknown until the model is loaded: no small model of this class could be built."
    computes_documents = spec.attn_implementation == "varlen" or (
        spec.attn_implementation == "auto"
        and not spec.compile
        and (file.device == "cpu" or plan.mixed_precision == "bf16")  # GPUs with bfloat16 have flash attention
    )
    isolation = finding.isolation if plan.pack and not computes_documents else None
    return _DryRun(
        located, base, trained, plan, isolates, isolation, inputs.device == "cuda", inputs.from_scratch, needs_data
    )


def _answer(
    spec: JobSpec, dry_run: _DryRun, rows: CheckedRows | None, tokenizer_size: int, pending: dict[str, str]
) -> CheckAnswer:
    """The answer for a valid spec. Adds the reasons why values are unknown to ``pending``."""
    import torch

    from zeta_core.memory.estimate import estimate_memory, optimizer_bytes
    from zeta_core.memory.zero_parts import ZeroSettings
    from zeta_core.model.inspection import embedding_rows
    from zeta_core.model.lora_coverage import num_base_weights
    from zeta_core.model.preparation import trained_precision
    from zeta_core.parallel.zero import zero_config

    located, plan, model = dry_run.located, dry_run.plan, dry_run.trained
    zero = ZeroSettings.of(zero_config(spec.use_deepspeed, plan)) if spec.use_deepspeed else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = embedding_rows(dry_run.base)
    depends_on_data = set(_BATCH) if dry_run.needs_data else set[str]()
    if spec.pack is None and plan.pack and not dry_run.is_from_scratch:
        depends_on_data.add("pack")
    return CheckAnswer(
        ok=True,
        resolved_spec=_resolved_spec(spec, plan, depends_on_data, pending),
        num_parameters=num_base_weights(dry_run.base),
        num_trained_parameters=sum(parameter.numel() for parameter in trained),
        memory=estimate_memory(model, plan, _activation_bytes(dry_run, pending), zero=zero),
        vocabulary=Vocabulary(
            embedding_rows=embeddings,
            tokenizer_size=tokenizer_size,
            fits=None if embeddings is None else tokenizer_size <= embeddings,
        ),
        isolates=dry_run.isolates,
        total_steps=plan.total_steps or None,
        tokens=None if dry_run.needs_data else plan.total_sequences * plan.seq_len or None,
        checkpoint_bytes=_checkpoint_bytes(model, located.dtype or torch.float32, trained_precision(plan))
        + optimizer_bytes(model, trained, plan),
        data=None if rows is None else rows.to_checked_data(plan.seq_len),
        pending=pending,
    )


def _activation_bytes(dry_run: _DryRun, pending: dict[str, str]) -> int | None:
    """The memory of activations and of the buffers of sharding."""
    from zeta_core.memory.estimate import building, estimate_activations

    found = estimate_activations(
        building(dry_run.located), dry_run.plan, on_gpu=dry_run.on_gpu, isolation=dry_run.isolation
    )
    if isinstance(found, int):
        return found
    pending["memory.activations"] = f"This model can't run on tensors without storage ({type(found).__name__})."
    return None


def _resolved_spec(
    spec: JobSpec, plan: Plan, depends_on_data: Collection[str], pending: dict[str, str]
) -> ResolvedSpec:
    """The resolved spec as far as the plan determines it without the data."""
    planned = {**plan.stored(), "global_batch_size": plan.global_batch}
    unknown = {*_NOT_RESOLVED, *depends_on_data}
    known = {name: value for name, value in planned.items() if name not in unknown}
    resolved = defaults.resolve(spec).updated(ResolvedSpec.model_validate(known))
    if plan.learning_rate:
        return resolved
    pending["learning_rate"] = RATE_UNKNOWN
    return resolved.model_copy(update={"learning_rate": None})


def _check_rows(
    spec: JobSpec, file: RunFile, locations: SourceLocations, tokenizer: Any, cache: Path, pending: dict[str, str]
) -> tuple[CheckedRows | None, int, list[IdType]]:
    """The checked rows of the dataset, and the largest id and the types of flat files of all checked data.

    Adds the reasons why rows were not checked to ``pending``. Raises `InvalidData`.
    """
    from zeta_core.data.row_check import check_dataset

    dataset, deadline = spec.dataset or defaults.DATASET, time.monotonic() + file.rows_seconds
    share = 1.0 if spec.eval_dataset is None else 1 - EVAL_SHARE
    found = check_dataset("dataset", spec, dataset, locations, tokenizer, cache, seconds=share * file.rows_seconds)
    checked = {"data": found}
    if spec.eval_dataset is not None:
        seconds = deadline - time.monotonic()
        evaluated = check_dataset("eval_dataset", spec, spec.eval_dataset, locations, tokenizer, cache, seconds=seconds)
        checked["eval_data"] = evaluated
        if not isinstance(evaluated, str) and not evaluated.complete:
            pending["eval_data"] = f"Only the first {evaluated.rows:,} rows were checked, because the time was limited."
    pending |= {name: reason for name, reason in checked.items() if isinstance(reason, str)}
    rows = [data for data in checked.values() if not isinstance(data, str)]
    largest_id = max((data.largest_id for data in rows), default=0)
    id_types = [data.id_type for data in rows if data.id_type is not None]
    return None if isinstance(found, str) else found, largest_id, id_types


def _checkpoint_bytes(model: Any, dtype: Any, trained: Any) -> int:
    """The size of the weights exported as ``dtype``, and of their copy in the ``trained`` type if it is another one."""
    saved = [p for p in model.parameters() if p.requires_grad]
    if len(saved) == len(list(model.parameters())) or not any("lora_" in name for name, _ in model.named_parameters()):
        saved = list(model.parameters())
    each = dtype.itemsize + (0 if dtype == trained else trained.itemsize)
    return sum(parameter.numel() for parameter in saved) * each
