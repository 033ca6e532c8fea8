"""Chat templates as Go templates of Ollama."""

import copy
import re
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
BRACES = (
    "{% for m in messages %}{{ '{{' + m['role'] + '}}' + m['content'] + '{{end}}' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
)


CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi {{ .Role }}"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]
ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def rendered_by_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """The text of the Go template for these messages, in the part of Go's template language that is used here."""
    tokens = ACTION.split(template)  # text, action, text, ...
    at = 0

    def block(message: dict[str, str], *, active: bool) -> tuple[str, str]:
        """The text up to ``end`` or ``else``, and this action."""
        nonlocal at
        text = ""
        while at < len(tokens):
            text += tokens[at] if active else ""
            at += 1
            if at >= len(tokens):
                break
            action = tokens[at]
            at += 1
            if action == "end" or action.startswith("else"):
                return text, action
            text += evaluated(action, message, active=active)
        return text, ""

    def evaluated(action: str, message: dict[str, str], *, active: bool) -> str:
        nonlocal at
        if action == ".Content":
            return message["content"] if active else ""
        if action == "range .Messages":
            start, text = at, ""
            for each in messages:
                at = start
                text += block(each, active=active)[0]
            return text
        text, branch, is_taken = "", action, False
        while branch != "end":
            condition = branch.removeprefix("else ").removeprefix("if ")
            first = re.fullmatch(r'ne \(index \.Messages 0\)\.Role "(\w+)"', condition)
            own = re.fullmatch(r'eq \.Role "(\w+)"', condition)
            assert first or own, f"{condition!r} is outside of the language"
            holds = messages[0]["role"] != first[1] if first else bool(own) and message["role"] == own[1]
            found, branch = block(message, active=active and holds and not is_taken)
            text, is_taken = text + found, is_taken or holds
        return text

    return block({}, active=True)[0]


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


@pytest.mark.parametrize("template", [None, LLAMA_3, GEMMA], ids=["smollm2", "llama3", "gemma"])
def test_the_go_template_renders_conversations_like_the_original(tokenizer: Any, template: str | None) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    found = simple_template(tokenizer)
    assert found is not None
    assert bool(found.preamble) == (template is None)
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = expected.removeprefix(tokenizer.bos_token) if template else expected
        assert rendered_by_ollama(found.as_go_template(), messages) == expected


@pytest.mark.parametrize("template", [NUMBERED, BRACES], ids=["numbered", "braces"])
def test_a_template_without_an_equivalent_is_left_out(tokenizer: Any, template: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    assert simple_template(tokenizer) is None
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer, [])
