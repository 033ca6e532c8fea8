"""Writing the ``README.md`` of an export: where it comes from, and the commands that run it."""

from __future__ import annotations

from zeta_core.contract.identifiers import is_hub_id
from zeta_core.contract.spec.export_spec import ExportSpec
from zeta_core.export.certificate import CERTIFICATE_FILE


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
        "A model for llama.cpp and programs that use it. Run it with Ollama, llama.cpp or vLLM:",
        f"```sh\nollama create {_served_name(spec)} -f Modelfile && ollama run {_served_name(spec)}\n```",
        f"```sh\nllama-server -m {file} --jinja\n```",
        f"```sh\nvllm serve ./{file} --served-model-name {_served_name(spec)}\n```",
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
