"""The comparison of an export with its checkpoint: broken exports are rejected, each with its code."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.harness.real_model import smollm2
from zeta_core.export.answers import ExportAnswers, answers_of
from zeta_core.export.certificate import Certificate, certify
from zeta_core.export.failures import ConverterUnavailable, ExportRejected
from zeta_core.export.gguf_environment import gguf_python
from zeta_core.export.gguf_file import ask_llama, convert
from zeta_core.export.prompts import fixed_prompts
from zeta_core.export.reference import Reference, read_reference
from zeta_core.export.weights import load_merged, load_tokenizer, write_merged

END, OTHER = "<|im_end|>", "<repo_name>"


class Models:
    """A small base model, and the same with changed weights, as if an adapter had been merged into it."""

    def __init__(self) -> None:
        path = smollm2()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(self.tokenizer),
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        torch.manual_seed(0)
        self.base: Any = LlamaForCausalLM(config).eval()
        self.base.generation_config = GenerationConfig(eos_token_id=self.tokenizer.eos_token_id)
        self.tuned: Any = copy.deepcopy(self.base)
        with torch.no_grad():
            for parameter in self.tuned.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        prompts = fixed_prompts(self.tokenizer, ["One?", "Two?"], reason="this is a test")
        self.reference: Reference = read_reference(self.tuned, self.tokenizer, lambda: self.base, prompts)

    def certify(self, answers: ExportAnswers, to: Any = "merged", weight_type: Any = "f16") -> Certificate:
        return certify(
            self.reference, answers, checkpoint="job_1/final", checkpoint_sha256="0", to=to, weight_type=weight_type
        )


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of the environment with the converter and llama.cpp, which is installed from the package index."""
    return gguf_python(tmp_path_factory.mktemp("environments"), None)


def certify_folder(models: Models, folder: Path) -> Certificate:
    return models.certify(answers_of(load_merged(folder), load_tokenizer(folder), models.reference))


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_merged_export_in_half_precision_is_accepted(models: Models, tmp_path: Path) -> None:
    write_merged(models.tuned, models.tokenizer, tmp_path, torch.float16)
    certificate = certify_folder(models, tmp_path)
    assert (certificate.prompt_source, certificate.prompts) == ("fixed", ("One?", "Two?"))
    assert certificate.token_agreement > 0.9
    assert certificate.kl_divergence < 0.01 < (certificate.base_kl_divergence or 0)
    assert next(models.tuned.parameters()).dtype == torch.float32, "the model is not changed"


def test_an_export_without_the_adapter_is_rejected(models: Models, tmp_path: Path) -> None:
    write_merged(models.base, models.tokenizer, tmp_path, torch.float16)
    with pytest.raises(ExportRejected, match="lost the adapter") as rejected:
        certify_folder(models, tmp_path)
    assert rejected.value.code == "adapter_lost"


def test_an_export_without_the_end_token_is_rejected(models: Models, tmp_path: Path) -> None:
    write_merged(models.tuned, models.tokenizer, tmp_path, torch.float16)
    rewrite(tmp_path / "generation_config.json", eos_token_id=models.tokenizer.convert_tokens_to_ids(OTHER))
    with pytest.raises(ExportRejected, match="never stops") as rejected:
        certify_folder(models, tmp_path)
    assert rejected.value.code == "never_stops"


def test_an_export_with_another_template_is_rejected(models: Models, tmp_path: Path) -> None:
    write_merged(models.tuned, models.tokenizer, tmp_path, torch.float16)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ExportRejected) as rejected:
        certify_folder(models, tmp_path)
    assert rejected.value.code == "template_differs"


def certify_gguf(models: Models, converter: Path, folder: Path) -> Certificate:
    file = folder.with_suffix(".gguf")
    convert(converter, folder, file, "f16")
    return models.certify(ask_llama(converter, file, models.reference), "gguf")


@pytest.mark.timeout(900)
def test_a_gguf_file_answers_like_the_checkpoint(models: Models, converter: Path, tmp_path: Path) -> None:
    write_merged(models.tuned, models.tokenizer, tmp_path / "good", torch.float16)
    certificate = certify_gguf(models, converter, tmp_path / "good")
    assert certificate.token_agreement >= 0.9
    assert certificate.kl_divergence < 0.02 < (certificate.base_kl_divergence or 0)
    assert certificate.same_template
    assert certificate.same_prompt_tokens


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_broken_gguf_files_are_rejected(models: Models, converter: Path, tmp_path: Path) -> None:
    lost, endless = tmp_path / "lost", tmp_path / "endless"
    write_merged(models.base, models.tokenizer, lost, torch.float16)
    write_merged(models.tuned, models.tokenizer, endless, torch.float16)
    rewrite(endless / "tokenizer_config.json", eos_token=OTHER)
    rewrite(endless / "config.json", eos_token_id=models.tokenizer.convert_tokens_to_ids(OTHER))
    for folder, code in ((lost, "adapter_lost"), (endless, "never_stops")):
        with pytest.raises(ExportRejected) as rejected:
            certify_gguf(models, converter, folder)
        assert rejected.value.code == code


def test_a_python_without_the_converter_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConverterUnavailable, match="can't be used"):
        gguf_python(tmp_path, tmp_path / "no-python")
