"""Writing the ``README.md`` of an adapter's checkpoint: how to obtain the base model, and how to load both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeta_core.contract.identifiers import is_hub_id, is_id
from zeta_core.contract.job.checkpoint import NAME_PATTERN
from zeta_core.contract.wire.run_directory import MERGED_NAME
from zeta_core.model.gguf import is_gguf
from zeta_core.model.located_model import ADAPTER_CONFIG, LocatedModel

README = "README.md"


@dataclass(frozen=True)
class _Base:
    """How to obtain and load the base model: a sentence, a shell command, and a Python expression with its import."""

    instructions: str
    load: str
    shell: str | None = None
    imports: str = "from transformers import AutoModelForCausalLM"


def adapter_readme(
    located: LocatedModel,
    tokenizer: Any,
    *,
    is_module: bool,
    has_merged: bool,
    generates: bool = False,
    resized_to: int | None = None,
) -> str:
    """The text of the file for an adapter that was trained on the model at ``located``.

    ``generates`` means that the directory contains the generation config of the adapted model, and ``resized_to`` is
    the number of embeddings if it differs from that of the base.
    """
    base = _base(located, is_module)
    tokenizer_class = "ByT5Tokenizer" if type(tokenizer).__name__ == "ByT5Tokenizer" else "AutoTokenizer"
    # peft does not read the generation config, which names the end token that the adapter has learned.
    generation = "model.generation_config = GenerationConfig.from_pretrained(directory)\n" if generates else ""
    resized = "" if resized_to is None else f"base.resize_token_embeddings({resized_to})  # for the added tokens\n"
    imported = f"{tokenizer_class}, GenerationConfig" if generates else tokenizer_class
    parts = [f"# LoRA adapter\n\nThis directory contains an adapter, not a complete model. {base.instructions}"]
    if base.shell is not None:
        parts.append(f"```sh\n{base.shell}\n```")
    parts.append(
        "Load both with `pip install peft transformers`:\n\n```python\n"
        f"from peft import PeftModel\nfrom transformers import {imported}\n{base.imports}\n\n"
        'directory = "."  # the path of this directory\n'
        f"base = {base.load}\n{resized}"
        f"model = PeftModel.from_pretrained(base, directory)\n{generation}"
        f"tokenizer = {tokenizer_class}.from_pretrained(directory)\n```"
    )
    if has_merged and not is_module:
        parts.append(
            "The merged model (base and adapter combined) needs neither peft nor the base:\n\n```python\n"
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{MERGED_NAME}")\n```'
        )
    return _front_matter(located.base_model) + "\n\n".join(parts) + "\n"


def _front_matter(base_model: str | None) -> str:
    """The metadata of a model card, so that the directory can be pushed to the Hub unchanged."""
    named = f"base_model: {base_model.partition('@')[0]}\n" if base_model is not None and _is_on_hub(base_model) else ""
    return f"---\n{named}library_name: peft\ntags:\n- lora\n---\n\n"


def _is_on_hub(base_model: str) -> bool:
    return is_hub_id(base_model) and "@" in base_model  # training records the commit of a Hub model


def _base(located: LocatedModel, is_module: bool) -> _Base:
    name = located.base_model
    if name is None or is_module:
        return _Base(
            "Its base model is built by your own code and has no name: replace `build_base` with the function that "
            "builds it, with the weights from before training.",
            load="build_base()",
            imports="from my_model import build_base",
        )
    if _is_on_hub(name):
        repository, _, revision = name.partition("@")
        return _Base(
            f"Its base model is `{repository}` on the Hugging Face Hub, at revision `{revision}`.",
            load=f'AutoModelForCausalLM.from_pretrained("{repository}", revision="{revision}")',
        )
    job, _, checkpoint = name.partition("/")
    if is_id(job, "job") and NAME_PATTERN.match(checkpoint):
        return _of_job(located, job, checkpoint)
    if is_id(name, "file"):
        return _Base(  # noqa: S604 - its field `shell` is text
            f"Its base model was uploaded to the service as `{name}`, a .tar archive. Download it:",
            load=_load_folder("base", located.directory),
            shell=(
                f'curl -fH "Authorization: Bearer $ZETA_API_KEY" "$ZETA_URL/v1/files/{name}/content" -o base.tar\n'
                "mkdir -p base && tar -xf base.tar -C base"
            ),
        )
    return _Base(f"Its base model is the local model `{name}`.", load=_load_folder(name, located.directory))


def _of_job(located: LocatedModel, job: str, checkpoint: str) -> _Base:
    """The base if it is a job's checkpoint: a complete model, an adapter with its merged model, or only an adapter."""
    instructions = f"Its base model is the checkpoint `{checkpoint}` of the job `{job}`. Download it:"
    shell = f"zeta download {job} --checkpoint {checkpoint} -o base"
    directory = located.directory
    if directory is not None and directory.name == MERGED_NAME:
        return _Base(instructions, _load_folder("base", directory), f"{shell} --merged")
    if directory is not None and (directory / ADAPTER_CONFIG).is_file():
        return _Base(
            f"{instructions[:-1]}; it is also an adapter, and its README.md explains how to obtain its own base:",
            'AutoPeftModelForCausalLM.from_pretrained("base").merge_and_unload()',
            shell,
            "from peft import AutoPeftModelForCausalLM",
        )
    return _Base(instructions, _load_folder("base", directory), shell)


def _load_folder(name: str, directory: Path | None) -> str:
    if directory is None or not is_gguf(directory):
        return f"AutoModelForCausalLM.from_pretrained({_quoted(name)})"
    folder = name.removesuffix(f"/{directory.name}")
    return f"AutoModelForCausalLM.from_pretrained({_quoted(folder)}, gguf_file={_quoted(directory.name)})"


def _quoted(text: str) -> str:
    return f'"{text}"' if text.isprintable() and not set(text) & set('"\\') else repr(text)
