"""Control tokens that a user typed stay text, with every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.harness.real_model import smollm2
from tests.zeta_core.data import chat_templates
from tests.zeta_core.data.chat_templates import byte_tokenizer
from tests.zeta_core.data.conversations import documents, tokens_of
from zeta_core.data.tokens import TokenFile
from zeta_core.failures import InvalidData

TYPED = "What is <|im_end|> for?"


def sentencepiece_tokenizer(*, unigram: bool) -> Any:
    """A tokenizer converted from SentencePiece: it adds a space before a text, and its control tokens are pieces."""
    letters = [*map(chr, range(33, 127)), "▁", "\n"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters)]
    if unigram:
        inside = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    else:
        inside = Tokenizer(
            models.BPE(vocab={piece: i for i, (piece, _) in enumerate(pieces)}, merges=[], unk_token="<unk>")
        )
    inside.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inside.decoder = decoders.Metaspace()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=inside, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def count(tokens: TokenFile, tokenizer: Any, token: str) -> int:
    return int((np.asarray(tokens.ids) == tokenizer.convert_tokens_to_ids(token)).sum())


def chat(question: str, answer: str = "It ends a turn.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (chat_templates.CHATML, "<|im_end|>"),
        (chat_templates.LLAMA3, "<|eot_id|>"),
        (chat_templates.GEMMA, "<end_of_turn>"),
    ],
    ids=["qwen", "llama 3", "gemma"],
)
def test_a_control_token_typed_in_a_turn_stays_text(template: str, token: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template)
    usual = tokens_of(tmp_path, [chat("Hi", "Hey")], tokenizer)
    typed = tokens_of(tmp_path, [chat(f"Hi {token}", f"Hey {token} you")], tokenizer)
    assert count(typed, tokenizer, token) == count(usual, tokenizer, token)
    [(text, [learned])] = documents(typed, tokenizer)
    assert f"Hi {token}" in text
    assert learned.startswith(f"Hey {token} you")
    assert (usual.num_control_tokens, typed.num_control_tokens) == (0, 2)
    assert typed.first_control_token == "chat.jsonl, line 1"
    allowed = tokens_of(tmp_path, [chat(f"Hi {token}", f"Hey {token} you")], tokenizer, allow_control_tokens=True)
    assert count(allowed, tokenizer, token) == count(usual, tokenizer, token) + 2
    assert allowed.num_control_tokens == 2


@pytest.mark.extended
def test_the_ids_equal_those_of_transformers_for_sanitized_turns(tmp_path: Path) -> None:
    path = smollm2()
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    row = chat(f"{TYPED} And <|endoftext|>?", "<|im_start|> begins one.")
    tokens = tokens_of(tmp_path, [row], tokenizer)
    expected = tokenizer.apply_chat_template(row["messages"], sanitize_control_tokens=True, return_dict=False)
    assert np.asarray(tokens.ids).tolist() == expected
    [(_, learned)] = documents(tokens, tokenizer)
    assert learned == ["<|im_start|> begins one.<|im_end|>\n"]


@pytest.mark.parametrize("unigram", [False, True], ids=["bpe", "unigram"])
def test_an_end_token_in_a_text_stays_text_with_sentencepiece(unigram: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(unigram=unigram)
    tokens = tokens_of(tmp_path, [chat("Is </s> an end?", "Yes, </s> is.")], tokenizer)
    assert count(tokens, tokenizer, "</s>") == 1, "only the token of the template"
    assert count(tokens, tokenizer, "<s>") == 1
    [(text, [learned])] = documents(tokens, tokenizer)
    assert "Is </s> an end?" in text
    assert learned.strip() == "Yes, </s> is.</s>"


def test_an_end_token_in_a_text_stays_text_with_a_slow_tokenizer(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()
    tokens = tokens_of(tmp_path, [chat("Is </s> an end?", "Yes, </s> is.")], tokenizer)
    assert count(tokens, tokenizer, "</s>") == 1
    assert tokens.num_control_tokens == 2
    assert "".join(documents(tokens, tokenizer)[0][1]).startswith("Yes, </s> is.")


@pytest.mark.parametrize("make", [lambda: byte_tokenizer(None), ByT5Tokenizer], ids=["fast", "slow"])
def test_control_tokens_in_plain_texts_and_pairs_stay_text_unless_allowed(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    end = tokenizer.eos_token
    for rows in ([{"text": f"a {end} b"}], [{"prompt": f"a {end}", "completion": f" b {end} c"}]):
        tokens = tokens_of(tmp_path, rows, tokenizer)
        assert count(tokens, tokenizer, end) == 1, "only the token at the end of the text"
        assert tokens.num_control_tokens == sum(text.count(end) for row in rows for text in row.values())
        allowed = tokens_of(tmp_path, rows, tokenizer, allow_control_tokens=True)
        assert count(allowed, tokenizer, end) == 1 + tokens.num_control_tokens


def test_a_text_with_its_own_begin_and_end_tokens_gets_no_others(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(unigram=False)
    text, pair = [{"text": "<s>[INST] Hi [/INST] Hey</s>"}], [{"prompt": "<s>Hi ", "completion": "Hey</s>"}]
    for rows in (text, pair):
        tokens = tokens_of(tmp_path, rows, tokenizer, allow_control_tokens=True)
        assert (count(tokens, tokenizer, "<s>"), count(tokens, tokenizer, "</s>")) == (1, 1)
    [(_, learned)] = documents(tokens_of(tmp_path, pair, tokenizer, allow_control_tokens=True), tokenizer)
    assert learned == ["Hey</s>"]


def test_added_tokens_stay_text_in_questions_and_are_tokens_in_answers(tmp_path: Path) -> None:
    """Qwen's <think> is an added token that is not special: an answer is trained to generate it."""
    tokenizer = byte_tokenizer(chat_templates.QWEN3)
    tokens = tokens_of(tmp_path, [chat("What is <think>?", "<think>\neasy\n</think>\n\nA mark.")], tokenizer)
    assert count(tokens, tokenizer, "<think>") == 1
    assert tokens.num_control_tokens == 1


def test_a_turn_marker_that_is_not_special_stays_text_in_an_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}[{{ m.role }}]{{ m.content }}[/T]{% endfor %}"
                               "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    tokenizer.add_tokens(["[/T]"])
    tokens = tokens_of(tmp_path, [chat("Hi", "A [/T] B")], tokenizer)
    assert count(tokens, tokenizer, "[/T]") == 2


def test_a_template_that_cuts_a_turn_at_a_control_token_is_an_error(tmp_path: Path) -> None:
    template = chat_templates.CHATML.replace("message['content']", "message['content'].split('<|end|>')[0]")
    row = chat("Hi <|end|> there")
    with pytest.raises(InvalidData, match=r"line 1: message 1: the tokenizer's chat template does not render all"):
        tokens_of(tmp_path, [row], byte_tokenizer(template))


def test_texts_with_the_characters_that_mark_turns_internally_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"line 1 contains U\+FDD0"):
        tokens_of(tmp_path, [chat("a \ufdd0 b")], byte_tokenizer(chat_templates.CHATML))
