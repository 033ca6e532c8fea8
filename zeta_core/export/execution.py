"""All steps of an export: computing the checkpoint's answers, writing the files, comparing and publishing them.

Guarantees: nothing is published unless its certificate was accepted. The published directory is a checkpoint named
``final``, so it has a manifest and is stored, downloaded and deleted like one.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from zeta_core.checkpoint.checkpoint_files import Checkpoint as StoredCheckpoint
from zeta_core.checkpoint.checkpoint_files import begin_checkpoint, find_damage, publish_checkpoint, read_checkpoint
from zeta_core.contract.job.checkpoint import FINAL_CHECKPOINT, CheckpointFormat, Manifest
from zeta_core.contract.job.events import CheckpointLine, utc_now
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.export.answers import ExportAnswers, answers_of
from zeta_core.export.certificate import CERTIFICATE_FILE, Certificate, certify
from zeta_core.export.gguf_environment import gguf_python
from zeta_core.export.gguf_file import ask_llama, convert
from zeta_core.export.model_card import adapter_part, gguf_card, merged_card
from zeta_core.export.ollama import modelfile
from zeta_core.export.prompts import choose_prompts
from zeta_core.export.reference import Reference, read_reference
from zeta_core.export.weights import DTYPES, copy_adapter, load_merged, load_tokenizer, write_merged
from zeta_core.failures import InvalidModel
from zeta_core.model.existing_adapter import disable_adapters
from zeta_core.model.inspection import num_positions
from zeta_core.model.located_model import ADAPTER_CONFIG, LocatedModel
from zeta_core.model.readme import README
from zeta_core.model.sources import locate_model, locate_written_checkpoint
from zeta_core.model.tokenizer import locate_tokenizer
from zeta_core.report.reporter import Reporter
from zeta_core.system.file_hash import file_sha256


@dataclass(frozen=True)
class ExportTask:
    """The inputs of an export job.

    Paths are absolute. ``held_out`` is the `HeldOutData` of the exported job. ``gguf_python`` is the operator's own
    Python, if any.
    """

    job_id: str
    spec: ExportSpec
    output_dir: Path
    cache: Path
    environments: Path
    locations: SourceLocations
    held_out: JsonValue = None
    gguf_python: Path | None = None


def export(task: ExportTask, report: Reporter) -> None:
    """Export a checkpoint. Raises `ExportRejected`, `CannotConvert`, `ConverterUnavailable` and `InvalidModel`."""
    checkpoint = _read_checkpoint(task)
    report.phase("loading_model")
    located = locate_model(task.spec.model, task.locations, task.cache)
    tokenizer = locate_tokenizer(None, located, task.locations, task.cache)
    reference = _reference(task, located, tokenizer, report)
    part = begin_checkpoint(task.output_dir, FINAL_CHECKPOINT)
    report.phase("saving")
    match task.spec.to:
        case "merged":
            answers = _merged(task, checkpoint, located, tokenizer, reference, part)
            checkpoint_format = "huggingface"
        case "adapter":
            answers = _adapter(task, checkpoint, reference, part)
            checkpoint_format = "adapter"
        case "gguf":
            answers = _gguf(task, checkpoint, located, tokenizer, reference, part, report)
            checkpoint_format = "gguf"
    certificate = certify(
        reference,
        answers,
        checkpoint=f"{task.spec.model.job}/{task.spec.model.checkpoint}",
        checkpoint_sha256=file_sha256(checkpoint.directory / MANIFEST_NAME),
        to=task.spec.to,
        weight_type=task.spec.weight_type,
    )
    _publish(task, checkpoint, certificate, part, checkpoint_format, report)


def _read_checkpoint(task: ExportTask) -> StoredCheckpoint:
    model = task.spec.model
    assert task.locations.artifacts_root is not None, "a job has an artifact store"
    directory = task.locations.artifacts_root / checkpoint_key(model.job, model.checkpoint)
    checkpoint = read_checkpoint(directory)
    if checkpoint is None:
        raise InvalidModel(f"Checkpoint {model.checkpoint} of {model.job} is not stored.")
    if (damage := find_damage(checkpoint)) is not None:
        raise InvalidModel(f"Checkpoint {model.checkpoint} of {model.job} is damaged: {damage}.")
    if checkpoint.manifest.format == "module":
        raise InvalidModel(
            f"Checkpoint {model.checkpoint} of {model.job} is a custom module, which has no other format."
        )
    if task.spec.to == "adapter" and checkpoint.manifest.format != "adapter":
        raise InvalidModel(
            f"Checkpoint {model.checkpoint} of {model.job} is a whole model, not an adapter; use merged."
        )
    return checkpoint


def _reference(task: ExportTask, located: LocatedModel, tokenizer: Any, report: Reporter) -> Reference:
    """The answers of the checkpoint and, if it is an adapter, of its base model."""
    if located.build_adapted is None:
        model = located.build().eval()
    else:
        model = located.build_adapted(lambda _: None).get_base_model().eval()
    _require_language_model(model, located.name)
    prompts = choose_prompts(
        task.held_out, tokenizer, task.locations, task.cache, report, context_tokens=num_positions(model)
    )
    without_adapter = None if located.build_adapted is None else partial(disable_adapters, model)
    return read_reference(model, tokenizer, without_adapter, prompts)


def _require_language_model(model: torch.nn.Module, name: str) -> None:
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise InvalidModel(f"{name} is not a causal language model of transformers, so it can't be exported.")


def _merged(
    task: ExportTask,
    checkpoint: StoredCheckpoint,
    located: LocatedModel,
    tokenizer: Any,
    reference: Reference,
    part: Path,
) -> ExportAnswers:
    assert task.spec.weight_type is not None, "merged has a type"
    write_merged(located.build(), tokenizer, part, DTYPES[task.spec.weight_type])
    (part / README).write_text(merged_card(task.spec, checkpoint.manifest.base_model), encoding="utf-8")
    gc.collect()
    return answers_of(load_merged(part), load_tokenizer(part), reference)


def _adapter(task: ExportTask, checkpoint: StoredCheckpoint, reference: Reference, part: Path) -> ExportAnswers:
    copy_adapter(checkpoint.directory, part)
    about_vllm = adapter_part(
        task.spec, checkpoint.manifest.base_model, json.loads((part / ADAPTER_CONFIG).read_bytes())
    )
    if about_vllm is not None:
        with (part / README).open("a", encoding="utf-8") as readme:
            readme.write(f"\n{about_vllm}")
    located = locate_written_checkpoint(part, task.job_id, task.locations, task.cache)
    tokenizer = locate_tokenizer(None, located, task.locations, task.cache)
    return answers_of(located.build().eval(), tokenizer, reference)


def _gguf(
    task: ExportTask,
    checkpoint: StoredCheckpoint,
    located: LocatedModel,
    tokenizer: Any,
    reference: Reference,
    part: Path,
    report: Reporter,
) -> ExportAnswers:
    weight_type = task.spec.weight_type
    assert weight_type is not None, "gguf has a type"
    if task.gguf_python is None:
        report.log("Preparing the environment of the GGUF converter.")
    python = gguf_python(task.environments, task.gguf_python)
    file = part / f"model-{weight_type}.gguf"
    with tempfile.TemporaryDirectory(prefix="merged-", dir=task.output_dir) as merged:
        # q8_0 is converted from half precision, which is more precise.
        write_merged(located.build(), tokenizer, Path(merged), DTYPES.get(weight_type, torch.float16))
        gc.collect()
        convert(python, Path(merged), file, weight_type)
    tokenizer.save_pretrained(part)  # vLLM needs it
    stops = [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(reference.ends)]
    (part / "Modelfile").write_text(modelfile(file.name, tokenizer, stops), encoding="utf-8")
    (part / README).write_text(gguf_card(task.spec, checkpoint.manifest.base_model, file.name), encoding="utf-8")
    report.phase("evaluating")
    return ask_llama(python, file, reference)


def _publish(
    task: ExportTask,
    checkpoint: StoredCheckpoint,
    certificate: Certificate,
    part: Path,
    checkpoint_format: CheckpointFormat,
    report: Reporter,
) -> None:
    (part / CERTIFICATE_FILE).write_text(certificate.model_dump_json(indent=2) + "\n", encoding="utf-8")
    source = checkpoint.manifest
    metrics = {"token_agreement": certificate.token_agreement, "kl_divergence": certificate.kl_divergence}
    target = task.output_dir / FINAL_CHECKPOINT
    if target.exists():  # from an attempt that ended before it reported the checkpoint
        shutil.rmtree(target)
    published = publish_checkpoint(
        part,
        task.output_dir,
        lambda files: Manifest(
            run_id=source.run_id,
            name=FINAL_CHECKPOINT,
            format=checkpoint_format,
            base_model=source.base_model,
            step=source.step,
            tokens=source.tokens,
            metrics=metrics,
            created_at=utc_now(),
            files=files,
        ),
    )
    report.write(CheckpointLine(name=FINAL_CHECKPOINT, step=source.step, metrics=metrics, bytes=published.size_bytes))
    report.log(
        f"The export agrees with the checkpoint on {certificate.token_agreement:.1%} of {certificate.num_tokens} "
        f"tokens after {_described(certificate)} (KL divergence {certificate.kl_divergence:.4f} nats per token)."
    )


def _described(certificate: Certificate) -> str:
    number, source = len(certificate.prompts), certificate.prompt_source
    what = f"{number} fixed prompt" if source == "fixed" else f"the beginnings of {number} document"
    return f"{what}{'' if number == 1 else 's'}{'' if source == 'fixed' else f' of its {source}'}"
