"""Writing the ``README.md`` of an export: where it comes from, and the commands that run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeta_core.contract.identifiers import is_hub_id
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.export.certificate import CERTIFICATE_FILE

# The values of --max-lora-rank that vLLM accepts; its default is 16.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def merged_card(spec: ExportSpec, base_model: str | None) -> str:
    return _card(
        spec,
        base_model,
        "transformers",
        "A complete model as safetensors. Run it with vLLM, or load it with transformers:",
        f"```sh\nvllm serve . --served-model-name {_served_name(spec)}\n```",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```',
    )


def gguf_card(spec: ExportSpec, base_model: str | None, file: str) -> str:
    return _card(
        spec,
        base_model,
        "gguf",
        "A model for llama.cpp and programs that use it. Run it with Ollama or llama.cpp:",
        f"```sh\nollama create {_served_name(spec)} -f Modelfile && ollama run {_served_name(spec)}\n```",
        f"```sh\nllama-server -m {file} --jinja\n```",
        "vLLM reads GGUF files with a plugin, on GPUs only, and with the tokenizer of this folder:",
        f"```sh\nuv pip install vllm-gguf-plugin\nvllm serve ./{file} --tokenizer . --served-model-name "
        f"{_served_name(spec)}\n```",
    )


def adapter_part(spec: ExportSpec, base_model: str | None, adapter: Mapping[str, Any]) -> str | None:
    """The part about vLLM for the README of an adapter with this ``adapter_config.json``.

    ``None`` for an adapter with DoRA or trained modules, which vLLM can't load, and for one of parameters outside of
    linear layers, with which vLLM was not tested.
    """
    if any(adapter.get(name) for name in ("use_dora", "modules_to_save", "target_parameters")):
        return None
    ranks = [adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()]
    rank = next((allowed for allowed in _VLLM_RANKS if allowed >= max(ranks)), None)
    if rank is None:
        return None
    repository, _, commit = (base_model or "").partition("@")
    base = f"{repository} --revision {commit}" if commit and is_hub_id(repository) else "BASE"
    hint = "" if base != "BASE" else " `BASE` is the folder of the base model."
    return (
        f"Run it on its base with vLLM.{hint}\n\n```sh\nvllm serve {base} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {_served_name(spec)}=.\n```\n"
    )


def _served_name(spec: ExportSpec) -> str:
    return spec.model.job.removeprefix("job_")


def _card(spec: ExportSpec, base_model: str | None, library: str, *parts: str) -> str:
    repository, _, commit = (base_model or "").partition("@")  # training records the commit of a Hub model
    base = f"base_model: {repository}\n" if commit and is_hub_id(repository) else ""
    front = f"---\n{base}library_name: {library}\npipeline_tag: text-generation\n---"
    origin = (
        f"Exported from checkpoint `{spec.model.checkpoint}` of the job `{spec.model.job}`. `{CERTIFICATE_FILE}` "
        "compares its answers with those of the checkpoint."
    )
    return "\n\n".join([front, f"# {_served_name(spec)}", *parts, origin]) + "\n"
