"""Writing the safetensors of an export, and loading them as other programs do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zeta_core.contract.spec.export_spec import WeightType
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, MERGED_NAME, TRAINING_STATE_NAME
from zeta_core.model.skeleton import build_skeleton
from zeta_core.report.library_noise import without_progress_bars

DTYPES: dict[WeightType, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}


def write_merged(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the transformers model in ``dtype`` with its configs and its tokenizer.

    Raises `CannotTrain` if its configs can't be saved.
    """
    skeleton = build_skeleton(model, dtype)
    assert skeleton is not None, "the caller has checked that it is a model of transformers"
    cast_once: dict[tuple[int, torch.Size], torch.Tensor] = {}  # tied weights stay tied
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast_once:
            cast_once[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        weights[name] = cast_once[key]
    skeleton.save(folder, weights)
    tokenizer.save_pretrained(folder)


def load_merged(folder: Path) -> nn.Module:
    """The exported model, loaded as a user of transformers would, in float32."""
    from transformers import AutoModelForCausalLM

    with without_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return cast(nn.Module, loaded.eval())


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, ByT5Tokenizer

    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_class: Any = ByT5Tokenizer if config.get("tokenizer_class") == "ByT5Tokenizer" else AutoTokenizer
    return tokenizer_class.from_pretrained(folder, local_files_only=True)


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """Copy the adapter with its tokenizer and configs, without the training state and the merged model."""
    for path in sorted(checkpoint.iterdir()):
        if path.name not in (MANIFEST_NAME, MERGED_NAME, TRAINING_STATE_NAME) and path.is_file():
            shutil.copy2(path, folder / path.name)
