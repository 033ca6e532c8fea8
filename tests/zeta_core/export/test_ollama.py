"""Chat templates as Go templates of Ollama."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness.real_model import smollm2
from zeta_core.export.ollama import modelfile, simple_template

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
NUMBERED = "{% for m in messages %}[{{ loop.index }}] {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    path: Path = smollm2()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_the_template_of_smollm2_keeps_its_system_message(tokenizer: Any) -> None:
    found = simple_template(tokenizer)
    assert found is not None
    assert "named SmolLM" in found.preamble
    assert found.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.generation_prompt == "<|im_start|>assistant\n"
    text = modelfile("m.gguf", tokenizer, ["<|im_end|>"])
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')


@pytest.mark.parametrize("template", [LLAMA_3, GEMMA], ids=["llama3", "gemma"])
def test_templates_of_other_families_are_converted(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    found = simple_template(tokenizer)
    assert found is not None
    assert not found.preamble


def test_a_template_that_counts_messages_has_no_equivalent(tokenizer: Any) -> None:
    tokenizer.chat_template = NUMBERED
    assert simple_template(tokenizer) is None
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer, [])
