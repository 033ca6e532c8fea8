"""All steps of an export: reading the checkpoint's answers, writing the files, comparing, and publishing them.

Guarantees: nothing is published unless its certificate was accepted. The published directory is a checkpoint named
``final``, so it has a manifest and is stored, downloaded and deleted like one.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeta_core.checkpoint.checkpoint_files import Checkpoint as StoredCheckpoint
from zeta_core.checkpoint.checkpoint_files import begin_checkpoint, find_damage, publish_checkpoint, read_checkpoint
from zeta_core.contract.job.checkpoint import CheckpointFormat, Manifest
from zeta_core.contract.job.events import CheckpointLine, utc_now
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.export.answers import ExportAnswers, answers_of
from zeta_core.export.certificate import CERTIFICATE_FILE, Certificate, certify
from zeta_core.export.gguf_environment import gguf_python
from zeta_core.export.gguf_file import ask_llama, convert
from zeta_core.export.model_card import gguf_card, merged_card
from zeta_core.export.ollama import modelfile
from zeta_core.export.reference import Reference, read_reference
from zeta_core.export.weights import DTYPES, adapter_switch, copy_adapter, load_merged, load_tokenizer, write_merged
from zeta_core.failures import InvalidModel
from zeta_core.model.readme import README
from zeta_core.model.sources import LocatedModel, locate_model, locate_written_checkpoint
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.report.reporter import Reporter
from zeta_core.system.file_hash import file_sha256

NAME = "final"


@dataclass(frozen=True)
class ExportRequest:
    """An export job. Paths are absolute; ``gguf_python`` is the operator's own environment, if any."""

    job_id: str
    spec: ExportSpec
    output_dir: Path
    cache: Path
    environments: Path
    locations: SourceLocations
    gguf_python: Path | None = None


def export(request: ExportRequest, report: Reporter) -> None:
    """Export a checkpoint. Raises `ExportRejected`, `CannotConvert`, `ConverterUnavailable` and `InvalidModel`."""
    checkpoint = _read(request)
    report.phase("loading_model")
    located = locate_model(request.spec.model, request.locations, request.cache)
    tokenizer = locate_tokenizer(None, located, request.locations, request.cache)
    reference = _reference(located, tokenizer)
    part = begin_checkpoint(request.output_dir, NAME)
    report.phase("saving")
    match request.spec.to:
        case "merged":
            answers, form = _merged(request, checkpoint, located, tokenizer, reference, part), "huggingface"
        case "adapter":
            answers, form = _adapter(request, checkpoint, reference, part), "adapter"
        case "gguf":
            answers, form = _gguf(request, checkpoint, located, tokenizer, reference, part, report), "gguf"
    certificate = certify(
        reference,
        answers,
        checkpoint=f"{request.spec.model.job}/{request.spec.model.checkpoint}",
        checkpoint_sha256=file_sha256(checkpoint.directory / MANIFEST_NAME),
        to=request.spec.to,
        weight_type=request.spec.weight_type,
    )
    _publish(request, checkpoint, certificate, part, form, report)


def _read(request: ExportRequest) -> StoredCheckpoint:
    model = request.spec.model
    assert request.locations.artifacts_root is not None, "a job has an artifact store"
    directory = request.locations.artifacts_root / checkpoint_key(model.job, model.checkpoint)
    checkpoint = read_checkpoint(directory)
    if checkpoint is None:
        raise InvalidModel(f"Checkpoint {model.checkpoint} of {model.job} is not stored.")
    if (damage := find_damage(checkpoint)) is not None:
        raise InvalidModel(f"Checkpoint {model.checkpoint} of {model.job} is damaged: {damage}.")
    if checkpoint.manifest.format == "module":
        raise InvalidModel(
            f"Checkpoint {model.checkpoint} of {model.job} is a custom module, which has no other format."
        )
    if request.spec.to == "adapter" and checkpoint.manifest.format != "adapter":
        raise InvalidModel(
            f"Checkpoint {model.checkpoint} of {model.job} is a whole model, not an adapter; use merged."
        )
    return checkpoint


def _reference(located: LocatedModel, tokenizer: Any) -> Reference:
    """The answers of the checkpoint, and those of its base if it is an adapter."""
    if located.build_adapted is None:
        model = located.build().eval()
        _require_language_model(model, located.name)
        return read_reference(model, tokenizer, None)
    model = located.build_adapted(lambda _: None).eval()
    _require_language_model(model, located.name)
    return read_reference(model, tokenizer, adapter_switch(model))


def _require_language_model(model: torch.nn.Module, name: str) -> None:
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise InvalidModel(f"{name} is not a causal language model of transformers, so it can't be exported.")


def _merged(
    request: ExportRequest,
    checkpoint: StoredCheckpoint,
    located: LocatedModel,
    tokenizer: Any,
    reference: Reference,
    part: Path,
) -> ExportAnswers:
    assert request.spec.weight_type is not None, "merged has a type"
    write_merged(located.build(), tokenizer, part, DTYPES[request.spec.weight_type])
    (part / README).write_text(merged_card(request.spec, checkpoint.manifest.base_model), encoding="utf-8")
    gc.collect()
    return answers_of(load_merged(part), load_tokenizer(part), reference)


def _adapter(request: ExportRequest, checkpoint: StoredCheckpoint, reference: Reference, part: Path) -> ExportAnswers:
    copy_adapter(checkpoint.directory, part)
    located = locate_written_checkpoint(part, request.job_id, request.locations, request.cache)
    tokenizer = locate_tokenizer(None, located, request.locations, request.cache)
    return answers_of(located.build().eval(), tokenizer, reference)


def _gguf(
    request: ExportRequest,
    checkpoint: StoredCheckpoint,
    located: LocatedModel,
    tokenizer: Any,
    reference: Reference,
    part: Path,
    report: Reporter,
) -> ExportAnswers:
    weight_type = request.spec.weight_type
    assert weight_type is not None, "gguf has a type"
    named = None if request.gguf_python is None else str(request.gguf_python)
    if named is None:
        report.log("Preparing the environment of the GGUF converter.")
    python = gguf_python(request.environments, named)
    file = part / f"model-{weight_type}.gguf"
    with tempfile.TemporaryDirectory(prefix="merged-", dir=request.output_dir) as merged:
        # In half precision, because q8_0 is less precise than it.
        write_merged(located.build(), tokenizer, Path(merged), DTYPES.get(weight_type, torch.float16))
        gc.collect()
        convert(python, Path(merged), file, weight_type)
    stops = [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(reference.ends)]
    (part / "Modelfile").write_text(modelfile(file.name, tokenizer, stops), encoding="utf-8")
    (part / README).write_text(gguf_card(request.spec, checkpoint.manifest.base_model, file.name), encoding="utf-8")
    report.phase("evaluating")
    return ask_llama(python, file, tokenizer, reference)


def _publish(
    request: ExportRequest,
    checkpoint: StoredCheckpoint,
    certificate: Certificate,
    part: Path,
    form: CheckpointFormat,
    report: Reporter,
) -> None:
    (part / CERTIFICATE_FILE).write_text(certificate.model_dump_json(indent=2) + "\n", encoding="utf-8")
    source = checkpoint.manifest
    metrics = {"token_agreement": certificate.token_agreement, "kl_divergence": certificate.kl_divergence}
    target = request.output_dir / NAME
    if target.exists():  # of an earlier attempt, which was ended between this line and its report
        shutil.rmtree(target)
    published = publish_checkpoint(
        part,
        request.output_dir,
        lambda files: Manifest(
            run_id=source.run_id,
            name=NAME,
            format=form,
            base_model=source.base_model,
            step=source.step,
            tokens=source.tokens,
            metrics=metrics,
            created_at=utc_now(),
            files=files,
        ),
    )
    report.write(CheckpointLine(name=NAME, step=source.step, metrics=metrics, bytes=published.size_bytes))
    report.log(
        f"The export agrees with the checkpoint on {certificate.token_agreement:.1%} of {certificate.num_tokens} "
        f"tokens (KL divergence {certificate.kl_divergence:.4f} nats per token)."
    )
