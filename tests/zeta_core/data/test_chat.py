"""Which tokens of a conversation are trained on, compared with tokens counted by hand, for many chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer

from tests.harness.real_model import smollm2
from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.data.conversations import CALLING, TWO_TURNS, WITH_SYSTEM, documents, tokens_of
from tests.zeta_core.runs import RecordedLines
from zeta_core.contract.job.events import WarningLine
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.documents.template import DEFAULT_TEMPLATE
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import prepare_tokens
from zeta_core.report.reporter import Reporter


# Trained tokens counted by hand: one token for each letter and one for each mark.
@pytest.mark.parametrize(
    ("template", "messages", "learned", "num_learned"),
    [
        (chat_templates.CHATML, WITH_SYSTEM, ["Hey!<|im_end|>\n", "So long.<|im_end|>\n"], 4 + 2 + 8 + 2),
        (chat_templates.SMOLLM2, TWO_TURNS, ["Hey!<|im_end|>\n", "So long.<|im_end|>\n"], 4 + 2 + 8 + 2),
        (chat_templates.SMOLLM2, WITH_SYSTEM, ["Hey!<|im_end|>\n", "So long.<|im_end|>\n"], 4 + 2 + 8 + 2),
        (chat_templates.LLAMA3, TWO_TURNS, ["Hey!<|eot_id|>", "So long.<|eot_id|>"], 4 + 1 + 8 + 1),
        (chat_templates.LLAMA3, WITH_SYSTEM, ["Hey!<|eot_id|>", "So long.<|eot_id|>"], 4 + 1 + 8 + 1),
        (chat_templates.LLAMA3_FIRST, TWO_TURNS, ["Hey!<|eot_id|>", "So long.<|eot_id|>"], 4 + 1 + 8 + 1),
        (chat_templates.LLAMA3_FIRST, WITH_SYSTEM, ["Hey!<|eot_id|>", "So long.<|eot_id|>"], 4 + 1 + 8 + 1),
        (chat_templates.GEMMA, TWO_TURNS, ["Hey!<end_of_turn>\n", "So long.<end_of_turn>\n"], 4 + 2 + 8 + 2),
        (chat_templates.MISTRAL, TWO_TURNS, ["Hey!<|end|>", "So long.<|end|>"], 4 + 1 + 8 + 1),
        (chat_templates.PHI3, WITH_SYSTEM, ["Hey!<|im_end|>\n", "So long.<|im_end|>\n<|end|>"], 4 + 2 + 8 + 3),
        (DEFAULT_TEMPLATE, WITH_SYSTEM, ["Hey!<|im_end|><|end|>\n", "So long.<|im_end|><|end|>\n"], 4 + 3 + 8 + 3),
    ],
    ids=[
        "chatml",
        "smollm2",
        "smollm2 with system",
        "llama 3.1",
        "llama 3.1 with system",
        "llama 3",
        "llama 3 with system",
        "gemma",
        "mistral",
        "phi 3",
        "default",
    ],
)
def test_only_the_assistants_turns_are_trained_on(
    template: str, messages: list[Any], learned: list[str], num_learned: int, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(template)
    tokens = tokens_of(tmp_path, [{"messages": messages}], tokenizer)
    [(text, parts)] = documents(tokens, tokenizer)
    assert parts == learned
    assert tokens.supervised is not None
    assert int(tokens.supervised.sum()) == num_learned
    written = tokenizer.apply_chat_template(messages, tokenize=False, date_string="05 Mar 2026")
    prompt_after_the_end = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert text == (written.removesuffix(prompt_after_the_end) if template is chat_templates.LLAMA3_FIRST else written)


@pytest.mark.extended
def test_smollm2s_tokenizer_and_template_train_on_answers_only(tmp_path: Path) -> None:
    path = smollm2()
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = tokens_of(tmp_path, [{"messages": TWO_TURNS}], tokenizer)
    [(text, parts)] = documents(tokens, tokenizer)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert parts == ["Hey!<|im_end|>\n", "So long.<|im_end|>\n"]
    assert tokens.supervised is not None
    assert int(tokens.supervised.sum()) == 4 + 5  # Hey ! <|im_end|> \n, and So _long . <|im_end|> \n


def test_turns_that_the_template_changes_later_are_trained_on_unchanged(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer(chat_templates.QWEN3)
    thinking = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
        {"role": "user", "content": "3+3"},
        {"role": "assistant", "content": "6"},
    ]
    tokens = tokens_of(tmp_path, [{"messages": thinking}], tokenizer)
    first = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\n3+3<|im_end|>\n<|im_start|>assistant\n"
    answers = ["<think>\neasy\n</think>\n\n4<|im_end|>\n", "<think>\n\n</think>\n\n6<|im_end|>\n"]
    assert documents(tokens, tokenizer) == [
        (first + answers[0], [answers[0]]),
        (first + "4<|im_end|>\n" + second + answers[1], ["6<|im_end|>\n"]),  # its empty thought is the prompt's
    ]
    assert tokens.num_split == 1
    assert tokens.supervised is not None
    # <think> \n easy \n </think> \n \n 4 <|im_end|> \n, and 6 <|im_end|> \n
    assert int(tokens.supervised.sum()) == (1 + 1 + 4 + 1 + 1 + 2 + 1 + 2) + (1 + 2)
    assert [tokens.location(document) for document in (0, 1)] == ["chat.jsonl, line 1"] * 2


def test_a_system_turn_that_moves_to_the_last_question_is_rendered_there(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.MISTRAL)
    tokens = tokens_of(tmp_path, [{"messages": WITH_SYSTEM}], tokenizer)
    begin = "<|begin_of_text|>"
    assert documents(tokens, tokenizer) == [
        (f"{begin}[INST]Be short.\n\nHi[/INST]Hey!<|end|>", ["Hey!<|end|>"]),
        (f"{begin}[INST]Hi[/INST]Hey!<|end|>[INST]Be short.\n\nBye[/INST]So long.<|end|>", ["So long.<|end|>"]),
    ]


def test_tool_calls_are_trained_on_and_tool_results_are_not(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.LLAMA3)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": [{"type": "text", "text": "Two"}]},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    tokens = tokens_of(tmp_path, [{"messages": messages, "tools": json.dumps(tools)}], tokenizer)
    [(text, learned)] = documents(tokens, tokenizer)
    assert learned == ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "Two<|eot_id|>"]
    assert '{"type": "function", "function": {"name": "add"}}\n1+1<|eot_id|>' in text


def test_a_tool_result_within_a_completion_is_not_trained_on(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.LLAMA3)
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    completion = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two"},
    ]
    tokens = tokens_of(tmp_path, [{"prompt": WITH_SYSTEM[:2], "completion": completion}], tokenizer)
    [(_, learned)] = documents(tokens, tokenizer)
    assert learned == ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "Two<|eot_id|>"]


def test_stripped_turns_and_tokens_across_turn_bounds_are_marked_correctly(
    tmp_path: Path,
) -> None:
    newline = chat_templates.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    tokenizer = byte_tokenizer(chat_templates.CHATML, merges=((newline, newline),))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nHey"}]
    tokens = tokens_of(tmp_path, [{"messages": messages}], tokenizer)
    # "assistant\n" and "\nHey" share a token, which does not exist if only the prompt is tokenized.
    assert documents(tokens, tokenizer)[0][1] == ["Hey<|im_end|>\n"]


@pytest.mark.parametrize(
    ("train_on", "learned"),
    [
        (None, ["Hey!<|im_end|>\n", "So long.<|im_end|>\n"]),
        ("assistant", ["Hey!<|im_end|>\n", "So long.<|im_end|>\n"]),
        ("completion", ["So long.<|im_end|>\n"]),
    ],
)
def test_train_on_selects_the_turns(train_on: str | None, learned: list[str], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.CHATML)
    tokens = tokens_of(tmp_path, [{"messages": TWO_TURNS}], tokenizer, train_on=train_on)
    assert documents(tokens, tokenizer)[0][1] == learned
    everything = tokens_of(tmp_path, [{"messages": TWO_TURNS}], tokenizer, train_on="all")
    assert everything.supervised is None


def test_training_on_a_pair_of_texts_starts_at_the_completion(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    rows = [{"question": "One and one is", "reply": " two."}]
    columns = {"prompt": "question", "completion": "reply"}
    tokens = tokens_of(tmp_path, rows, tokenizer, columns=columns)
    assert documents(tokens, tokenizer) == [("One and one is two.<|end|>", [" two.<|end|>"])]
    assert tokenizer.chat_template is None, "no conversation was written, so no template was needed"


def test_a_text_begins_as_the_tokenizer_begins_every_text(tmp_path: Path) -> None:
    """Llama, Gemma and Mistral begin texts with a token; their templates write it themselves."""
    tokenizer = byte_tokenizer(chat_templates.MISTRAL)
    begin = "<|begin_of_text|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    pairs = tokens_of(tmp_path, [{"prompt": "Hi", "completion": " you"}], tokenizer)
    assert documents(pairs, tokenizer) == [(f"{begin}Hi you<|end|>", [" you<|end|>"])]
    chat = tokens_of(tmp_path, [{"messages": TWO_TURNS}], tokenizer)
    assert documents(chat, tokenizer)[0][0].count(begin) == 1
    lines = tokens_of(tmp_path, [{"text": "One"}, {"text": "Two"}], tokenizer)
    assert [text for text, _ in documents(lines, tokenizer)] == [f"{begin}One<|end|>", f"{begin}Two<|end|>"]
    (tmp_path / "long.txt").write_text("A line of this text.\n" * 30_000)  # is read in several pieces
    options = parse(TrainerOptions, {"dataset": {"path": str(tmp_path / "long.txt")}})
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    whole = prepare_tokens(sources, tokenizer, tmp_path / "cache", Reporter())
    assert np.flatnonzero(np.asarray(whole.ids) == tokenizer.bos_token_id).tolist() == [0]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (TWO_TURNS[:3], TWO_TURNS[3:]),
        (TWO_TURNS[:3], "So long."),
        (TWO_TURNS[2], TWO_TURNS[3]),
        ("Bye", TWO_TURNS[3:]),
    ],
    ids=["lists", "list and text", "messages", "text and list"],
)
def test_a_pair_of_turns_goes_through_the_template(prompt: Any, completion: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.GEMMA)
    tokens = tokens_of(tmp_path, [{"prompt": prompt, "completion": completion}], tokenizer)
    [(text, learned)] = documents(tokens, tokenizer)
    assert learned == ["So long.<end_of_turn>\n"]
    assert text.endswith("<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSo long.<end_of_turn>\n")


def test_a_turn_of_weight_zero_is_not_trained_on(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_templates.CHATML)
    messages = [TWO_TURNS[0], {**TWO_TURNS[1], "weight": 0}, TWO_TURNS[2], {**TWO_TURNS[3], "weight": 1}]
    tokens = tokens_of(tmp_path, [{"messages": messages}], tokenizer)
    [(text, learned)] = documents(tokens, tokenizer)
    assert learned == ["So long.<|im_end|>\n"]
    assert "Hey!" in text


def test_a_tokenizer_without_a_template_gets_the_default_one_with_a_warning(tmp_path: Path) -> None:
    recorded = RecordedLines()
    tokenizer = ByT5Tokenizer()
    report = Reporter(recorded)
    first = tokens_of(tmp_path, [{"messages": WITH_SYSTEM}], tokenizer, report=report)
    assert tokenizer.chat_template == DEFAULT_TEMPLATE
    learned = documents(first, tokenizer)[0][1]
    assert [part.replace("</s>", "") for part in learned] == ["Hey!<|im_end|>", "So long.<|im_end|>"]
    # The second run finds the cached tokens, and a tokenizer that does not have the template yet.
    again = ByT5Tokenizer()
    assert tokens_of(tmp_path, [{"messages": WITH_SYSTEM}], again, report=report).fingerprint == first.fingerprint
    assert again.chat_template == DEFAULT_TEMPLATE
    codes = [line.code for line in recorded.all if isinstance(line, WarningLine)]
    assert codes == ["default_chat_template"] * 2
    again.save_pretrained(tmp_path / "saved")
    assert ByT5Tokenizer.from_pretrained(tmp_path / "saved").chat_template == DEFAULT_TEMPLATE


def test_conversations_in_a_table_give_the_same_tokens_as_json_lines(tmp_path: Path) -> None:
    """Tool calls have different arguments, and a table adds the arguments of other calls as nulls."""
    tokenizer = byte_tokenizer(chat_templates.LLAMA3)
    path = tmp_path / "chat.parquet"
    calls = [
        [CALLING[0], {**CALLING[1], "tool_calls": [{"function": {"name": "add", "arguments": {n: 1}}}]}] for n in "ab"
    ]
    parquet.write_table(pa.table({"messages": [TWO_TURNS, TWO_TURNS[:2], *calls]}), path)
    options = parse(TrainerOptions, {"dataset": {"path": str(path)}})
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    tokens = prepare_tokens(sources, tokenizer, tmp_path / "cache", Reporter())
    assert [parts for _, parts in documents(tokens, tokenizer)] == [
        ["Hey!<|eot_id|>", "So long.<|eot_id|>"],
        ["Hey!<|eot_id|>"],
        ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>'],
        ['{"name": "add", "parameters": {"b": 1}}<|eot_id|>'],
    ]
    assert tokens.location(1) == "chat.parquet, row 2"
