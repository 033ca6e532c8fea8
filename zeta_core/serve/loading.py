"""Loading a model to answer: the weights of a checkpoint or of a base model, its tokenizer, and its end tokens.

Weights are loaded as training loads them (`zeta_core.model.sources`); a GGUF file is dequantized. An adapter is not
merged into its base, as in transformers with the downloaded checkpoint, so several adapters can share a base. An
adapter that was trained on a 4-bit base gets the same 4-bit base. On a GPU the weights keep their stored precision. On
a CPU they are computed in float32, in which CPUs are fastest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from zeta_core.contract.spec.options import Quantization
from zeta_core.contract.spec.sources import JobModel, NamedModel
from zeta_core.contract.wire.answers import ServeFile
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, checkpoint_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel, WeightsReplaced
from zeta_core.model.adapter_checkpoint import stored_embeddings
from zeta_core.model.existing_adapter import parts_of_adapter
from zeta_core.model.inspection import embedding_rows, num_positions
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.quantization import quantize, quantize_experts, require_bitsandbytes
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

DEFAULT_CONTEXT_TOKENS = 8192  # of a model without a limit


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode. ``ends`` are the tokens that end an answer.

    ``adapted`` is the base with the adapter, to which other adapters can be added; ``None`` for a whole model.
    ``has_own_embeddings``: the adapter contains embeddings, so the base may have another number of them.
    """

    model: nn.Module
    tokenizer: Any
    device: torch.device
    ends: frozenset[int]
    context_tokens: int
    adapted: PeftModel | None = None
    has_own_embeddings: bool = False


def source_locations(file: ServeFile) -> SourceLocations:
    """The locations that the weights of ``file`` may be read from."""
    return SourceLocations(
        files=file.weights.files,
        artifacts_root=Path(file.artifacts_root),
        data_root=None if file.data_root is None else Path(file.data_root),
        allow_hub=file.hub,
        bases=frozenset(file.weights.bases),
    )


def load(file: ServeFile) -> LoadedModel:
    """Load the weights of ``serve.json``. Raises `InvalidModel`."""
    source = NamedModel.model_validate({"model": file.weights.model}).model
    locations = source_locations(file)
    cache = Path(file.cache_dir)
    check_manifest(file)
    located = locate_model(source, locations, cache)
    tokenizer = locate_tokenizer(None, located, locations, cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = _built(located, device, file.weights.quantize)
    model, adapted = built if isinstance(built, tuple) else (built, None)
    check_manifest(file)  # a run may have replaced the checkpoint in the meantime
    if not hasattr(model, "get_input_embeddings"):
        raise InvalidModel(f"{file.weights.name} is not a causal language model of transformers, so it can't answer.")
    rows = embedding_rows(model)
    if rows is not None and len(tokenizer) > rows:
        tokens = f"{len(tokenizer)} tokens, but the model has embeddings for {rows}"
        raise InvalidModel(f"The tokenizer of {file.weights.name} has {tokens}.")
    context_tokens = num_positions(model) or DEFAULT_CONTEXT_TOKENS
    generation_config = getattr(model, "generation_config", None)
    ends = end_tokens(generation_config, tokenizer)
    has_own_embeddings = adapted is not None and bool(stored_embeddings(model, _directory_of(located)))
    return LoadedModel(model.eval(), tokenizer, device, ends, context_tokens, adapted, has_own_embeddings)


def _directory_of(located: LocatedModel) -> Path:
    assert located.directory is not None, "an adapter has files"
    return located.directory


def _built(
    located: LocatedModel, device: torch.device, quantization: Quantization | None
) -> nn.Module | tuple[nn.Module, PeftModel]:
    """The model, and for an adapter also the object that manages it."""
    if quantization is not None:
        require_bitsandbytes()
    if located.build_adapted is not None:
        prepare = partial(_to_precision, dtype=located.dtype, device=device)
        if quantization is not None:
            prepare = partial(quantize, kind=quantization, dtype=_computed_in(device), device=device)
        adapted = located.build_adapted(prepare)
        model = adapted.get_base_model()
        if quantization == "nf4-experts":
            quantize_experts(model, _computed_in(device), device, keep=parts_of_adapter(model))
        return model.to(device), adapted
    if quantization is not None:
        model = located.build()
        quantize(model, quantization, _computed_in(device), device)
        if quantization == "nf4-experts":
            quantize_experts(model, _computed_in(device), device)
        return model.to(device)
    if device.type == "cpu":
        return located.build().float()
    if located.build_mapped is not None:
        return located.build_mapped().to(device)
    return located.build().to(device, located.dtype)


def _computed_in(device: torch.device) -> torch.dtype:
    """The precision that quantized weights are dequantized to."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _to_precision(base: nn.Module, dtype: torch.dtype | None, device: torch.device) -> None:
    """Give the base of an adapter the precision in which it answers."""
    if device.type == "cpu":
        base.float()
    else:
        base.to(device, dtype)


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens at which ``generate`` of transformers ends; the tokenizer's own if the model names none."""
    named = getattr(generation_config, "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    return frozenset({named} if isinstance(named, int) else cast("list[int]", named or []))


def check_manifest(file: ServeFile) -> None:
    """Raise `WeightsReplaced` unless the checkpoint is the one that was requested."""
    model = file.weights.model
    if not file.weights.has_manifest or not isinstance(model, Mapping):
        return
    source = JobModel.model_validate(model)
    manifest = Path(file.artifacts_root) / checkpoint_key(source.job, source.checkpoint) / MANIFEST_NAME
    try:
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise WeightsReplaced(f"{file.weights.name} was removed; request another checkpoint.") from error
    if digest != file.weights.fingerprint:
        raise WeightsReplaced(f"{file.weights.name} was replaced by a newer one; send the request again.")
