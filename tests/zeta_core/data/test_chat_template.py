"""The chat template of a run: its date, its beginning, and templates from a spec."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.data.conversations import TODAY, TWO_TURNS, documents, tokens_of
from tests.zeta_core.runs import RecordedLines
from zeta_core.contract.errors import InvalidSpec
from zeta_core.contract.job.events import WarningLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.validation import parse
from zeta_core.data.documents.template import DEFAULT_TEMPLATE, Template, set_template
from zeta_core.data.tokens.cache import fingerprint
from zeta_core.failures import CannotTrain
from zeta_core.report.reporter import Reporter

ROW = {"messages": TWO_TURNS}
BEGIN = "<|begin_of_text|>"


def beginning_tokenizer(template: str | None) -> Any:
    """A tokenizer that adds a token before every text, like those of Llama, Gemma and Mistral."""
    tokenizer = byte_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_a_template_with_the_current_date_renders_the_day_of_the_start(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.SMOLLM3)
    turns = [TWO_TURNS[0], {**TWO_TURNS[1], "reasoning_content": "A greeting."}]
    [(text, learned)] = documents(tokens_of(tmp_path, [{"messages": turns}], tokenizer), tokenizer)
    assert text.startswith("<|im_start|>system\nToday Date: 05 March 2026<|im_end|>\n")
    assert learned == ["<think>\nA greeting.\n</think>\nHey!<|im_end|>\n"]


def test_only_a_template_with_a_date_depends_on_the_day() -> None:
    dated, other = byte_tokenizer(chat_templates.SMOLLM3), byte_tokenizer(chat_templates.CHATML)
    days = (TODAY, date(2026, 3, 6))
    assert len({fingerprint(dated, day) for day in days}) == 2
    assert len({fingerprint(other, day) for day in days}) == 1


def test_functions_of_templates_work() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m | tojson(ensure_ascii=true) }}{{ strftime_now('%Y') }}{% endfor %}"
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    )
    template = Template(tokenizer, TODAY)
    assert template.render([{"role": "user", "content": "é"}], None) == '{"role": "user", "content": "\\u00e9"}2026'


@pytest.mark.parametrize(
    "template",
    [None, chat_templates.CHATML, chat_templates.LLAMA3, chat_templates.MISTRAL, chat_templates.LLAMA3_FIRST],
)
def test_a_conversation_has_the_beginning_token_once_like_a_text(template: str | None, tmp_path: Path) -> None:
    tokenizer = beginning_tokenizer(template)
    tokens = tokens_of(tmp_path, [ROW], tokenizer)
    assert np.flatnonzero(np.asarray(tokens.ids) == tokenizer.bos_token_id).tolist() == [0]
    written = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert written.startswith(BEGIN), "the saved template also begins with it"
    assert written.count(BEGIN) == 1
    again = tokens_of(tmp_path, [ROW], tokenizer)
    assert again.fingerprint == tokens.fingerprint, "the changed template gives the same data"
    if template is None:
        assert tokenizer.apply_chat_template(TWO_TURNS[:1], tokenize=False, add_generation_prompt=True).endswith(
            "<|im_start|>assistant\n"
        )


def test_a_tokenizer_without_a_beginning_keeps_its_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.CHATML)
    tokens_of(tmp_path, [ROW], tokenizer)
    assert tokenizer.chat_template == chat_templates.CHATML


def test_a_template_of_the_spec_replaces_the_tokenizers(tmp_path: Path) -> None:
    recorded = RecordedLines()
    tokenizer = byte_tokenizer(None)
    set_template(tokenizer, chat_templates.GEMMA)
    tokens = tokens_of(tmp_path, [ROW], tokenizer, report=Reporter(recorded))
    assert documents(tokens, tokenizer)[0][1] == ["Hey!<end_of_turn>\n", "So long.<end_of_turn>\n"]
    assert not [line for line in recorded.all if isinstance(line, WarningLine)]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == chat_templates.GEMMA


def test_a_template_is_chosen_by_its_name() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = {"default": chat_templates.CHATML, "rag": chat_templates.GEMMA}
    with pytest.raises(
        CannotTrain, match=r"chat_template is 'tool', but the tokenizer's templates are: 'default', 'rag'"
    ):
        set_template(tokenizer, "tool")
    set_template(tokenizer, "rag")
    assert tokenizer.chat_template == chat_templates.GEMMA


def test_a_template_with_a_syntax_error_is_named_before_the_data_is_read() -> None:
    tokenizer = byte_tokenizer(None)
    with pytest.raises(CannotTrain, match="chat_template is not a valid Jinja template: line 2: "):
        set_template(tokenizer, "{% for m in messages %}\n{{ m.content }")
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"chat_template": "chat/own.txt"},
            "chat_template is 'chat/own.txt'; it is neither a Jinja template nor the name",
        ),
        ({"chat_template": "{{ x }}", "use_pretokenized": True}, "it has no effect on token ids"),
        (
            {"dataset": {"path": "a", "drop_fields": ["content"]}},
            "dataset.drop_fields is .*every turn needs its 'content'",
        ),
        ({"chat_template": "x" * 200_001}, "chat_template"),
    ],
)
def test_a_setting_of_conversations_without_effect_is_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse(TrainerOptions, options)


def test_the_default_template_is_the_documented_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    tokens_of(tmp_path, [ROW], tokenizer)
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
