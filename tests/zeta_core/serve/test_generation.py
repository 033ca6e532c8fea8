"""Answering several requests at once gives the text that transformers' ``generate`` gives for each alone."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from tests.zeta_core.models import llama
from zeta_core.contract.wire.answers import AnswerOptions, Generate, Generated, Piece, Prompt
from zeta_core.serve.choice import Choice
from zeta_core.serve.generation import Generation
from zeta_core.serve.loading import LoadedModel
from zeta_core.serve.sampling import TokenSampler

TEXTS = ["Which river?", "Who goes there, and why so late at night?", "a", "The sea " * 9]


def loaded_model(model: Any, *, ends: Sequence[int] = ()) -> LoadedModel:
    return LoadedModel(model.eval(), byte_tokenizer(CHATML), torch.device("cpu"), frozenset(ends), 256)


class Answers:
    """Runs requests to their ends, and collects what is sent for each."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.sent: dict[str, list[Generated]] = {}
        self.generation = Generation(loaded, lambda sent: self.sent.setdefault(sent.request_id, []).append(sent))

    def add(self, name: str, prompt: Prompt | str, **options: Any) -> None:
        prompt = Prompt(text=prompt) if isinstance(prompt, str) else prompt
        options = {"temperature": 0.0, "max_tokens": 24, **options}
        self.generation.add(Generate(request_id=name, prompt=prompt, options=AnswerOptions(**options)))

    def run(self) -> None:
        for _ in range(1000):
            if self.generation.is_idle:
                return
            self.generation.step()
        raise AssertionError("the requests did not end")

    def text(self, name: str, choice: int = 0) -> str:
        return "".join(piece.text for sent in self.sent[name] for piece in sent.pieces if piece.choice == choice)

    def answer(self, name: str, prompt: Prompt | str, **options: Any) -> str:
        self.add(name, prompt, **options)
        self.run()
        return self.text(name)


def generated_ids(loaded: LoadedModel, text: str, num_tokens: int = 24) -> list[int]:
    model: Any = loaded.model
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def generated_text(loaded: LoadedModel, text: str, num_tokens: int = 24) -> str:
    return loaded.tokenizer.decode(generated_ids(loaded, text, num_tokens), skip_special_tokens=True)


@pytest.fixture
def loaded() -> LoadedModel:
    return loaded_model(llama())


def test_concurrent_greedy_answers_equal_those_of_generate(loaded: LoadedModel) -> None:
    answers = Answers(loaded)
    for number, text in enumerate(TEXTS):  # each one joins while the others are being decoded
        answers.add(str(number), text, max_tokens=24 + number)
        answers.generation.step()
        answers.generation.step()
    answers.run()
    for number, text in enumerate(TEXTS):
        assert answers.text(str(number)) == generated_text(loaded, text, 24 + number)
        assert answers.sent[str(number)][0].prompt_tokens == len(text.encode())
        assert answers.sent[str(number)][-1].pieces[-1].num_tokens == 24 + number
        assert answers.sent[str(number)][-1].pieces[-1].finish_reason == "length"


def test_eight_chats_at_once_need_half_of_the_time_of_single_ones() -> None:
    """In processor time, which does not depend on other processes. The benchmark measures tokens per second."""
    loaded = loaded_model(llama(hidden_size=512, intermediate_size=1376))
    seconds: list[float] = []
    for at_once in (True, False) * 3:
        answers = Answers(loaded)
        started = time.process_time()
        for number in range(8):
            answers.add(str(number), f"Number {number}", max_tokens=16)
            if not at_once:
                answers.run()
        answers.run()
        seconds.append(time.process_time() - started)
        assert sum(len(answers.sent[str(number)]) > 0 for number in range(8)) == 8
    assert sum(seconds[0::2]) < sum(seconds[1::2]) / 2, seconds


@pytest.mark.parametrize("family", ["mistral", "mamba", "gpt2"])
def test_other_families_are_decoded_together_too(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "mistral": {"num_key_value_heads": 2, "num_attention_heads": 4, "intermediate_size": 64, "sliding_window": 8},
        "mamba": {"state_size": 4},
        "gpt2": {"n_head": 2},
    }
    size = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 384, **sizes[family]}
    loaded = loaded_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size)))
    answers = Answers(loaded)
    for text in TEXTS:
        answers.add(text, text)
    answers.run()
    for text in TEXTS:
        assert answers.text(text) == generated_text(loaded, text)


def test_the_same_seed_gives_the_same_text_alone_and_among_others(loaded: LoadedModel) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "seed": 11, "max_tokens": 40}
    alone = Answers(loaded).answer("one", TEXTS[0], **options)
    answers = Answers(loaded)
    for number, text in enumerate(TEXTS):
        answers.add(f"other-{number}", text, temperature=1.0)
    assert answers.answer("one", TEXTS[0], **options) == alone
    assert Answers(loaded).answer("one", TEXTS[0], **{**options, "seed": 12}) != alone


def test_choices_of_one_request_differ_and_are_counted(loaded: LoadedModel) -> None:
    answers = Answers(loaded)
    answers.add("n", "Hi", n=3, temperature=1.0, seed=5, max_tokens=8)
    answers.run()
    texts = {answers.text("n", choice) for choice in range(3)}
    assert len(texts) == 3
    last = {piece.choice: piece for sent in answers.sent["n"] for piece in sent.pieces}
    assert [last[choice].num_tokens for choice in range(3)] == [8, 8, 8]
    assert [sent.is_last for sent in answers.sent["n"]].count(True) == 1


def test_each_of_several_prompts_gets_the_choices_that_it_gets_alone(loaded: LoadedModel) -> None:
    options = AnswerOptions(n=2, seed=5, max_tokens=8)
    answers = Answers(loaded)
    texts: list[str] = []
    for name, prompt in (("together", Prompt(text=TEXTS[:2])), *((text, Prompt(text=text)) for text in TEXTS[:2])):
        answers.generation.add(Generate(request_id=name, prompt=prompt, options=options))
        answers.run()
        texts += [answers.text(name, choice) for choice in range(len(prompt.texts) * options.n)]
    assert texts[:4] == texts[4:]
    assert answers.sent["together"][0].prompt_tokens == sum(len(text.encode()) for text in TEXTS[:2])


def test_text_ends_before_a_stop_string(loaded: LoadedModel) -> None:
    whole = generated_text(loaded, TEXTS[1], 24)
    stop = whole[5:8]
    answers = Answers(loaded)
    assert answers.answer("s", TEXTS[1], stop=[stop]) == whole[: whole.index(stop)]
    assert answers.sent["s"][-1].pieces[-1].finish_reason == "stop"


def test_an_end_token_ends_the_answer_and_is_counted() -> None:
    model = llama()
    end = generated_ids(loaded_model(model), TEXTS[0])[3]
    answers = Answers(loaded_model(model, ends=[end]))
    answers.answer("e", TEXTS[0])
    piece = answers.sent["e"][-1].pieces[-1]
    assert piece.finish_reason == "stop"
    assert piece.num_tokens == 1 + generated_ids(loaded_model(model), TEXTS[0]).index(end)


def test_log_probabilities_are_those_of_the_model(loaded: LoadedModel) -> None:
    answers = Answers(loaded)
    answers.answer("l", "Hi", logprobs=True, top_logprobs=3, max_tokens=4)
    entries = [entry for sent in answers.sent["l"] for piece in sent.pieces for entry in piece.logprobs]
    ids = loaded.tokenizer("Hi", add_special_tokens=False, return_tensors="pt")["input_ids"]
    model: Any = loaded.model
    with torch.no_grad():
        first = torch.log_softmax(model(ids).logits[0, -1], dim=-1)
    assert len(entries) == 4
    assert entries[0].logprob == pytest.approx(float(first.max()), abs=1e-6)
    assert [top.logprob for top in entries[0].top] == pytest.approx(first.topk(3).values.tolist(), abs=1e-6)


def test_penalties_avoid_repetition() -> None:
    logits = torch.tensor([3.0, 2.5, 1.0, 0.0])
    assert [TokenSampler(AnswerOptions(temperature=0.0), 0).choose(logits).token for _ in range(3)] == [0, 0, 0]
    present = TokenSampler(AnswerOptions(temperature=0.0, presence_penalty=1.0), 0)
    assert [present.choose(logits).token for _ in range(4)] == [0, 1, 0, 0]
    frequent = TokenSampler(AnswerOptions(temperature=0.0, frequency_penalty=1.0), 0)
    assert [frequent.choose(logits).token for _ in range(5)] == [0, 1, 0, 1, 0]


def test_top_p_draws_only_from_the_most_probable_tokens() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = TokenSampler(AnswerOptions(top_p=0.6, seed=1), 0)
    assert {sampler.choose(logits).token for _ in range(200)} == {0, 1}
    sampler = TokenSampler(AnswerOptions(seed=1), 0)
    drawn = [sampler.choose(logits).token for _ in range(4000)]
    assert [drawn.count(token) / 4000 for token in range(4)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_a_cancelled_request_leaves_the_others_unchanged(loaded: LoadedModel) -> None:
    answers = Answers(loaded)
    answers.add("gone", TEXTS[3])
    answers.add("kept", TEXTS[0])
    for _ in range(5):
        answers.generation.step()
    answers.generation.cancel("gone")
    num_sent = len(answers.sent["gone"])
    answers.run()
    assert len(answers.sent["gone"]) == num_sent
    assert answers.text("kept") == generated_text(loaded, TEXTS[0])


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(loaded: LoadedModel) -> None:
    answers = Answers(loaded)
    answers.add("long", "x" * 250, max_tokens=10)
    failure = answers.sent["long"][0].failure
    assert failure is not None
    assert failure.code == "invalid_request"
    assert "256 tokens, but the prompt has 250, and max_tokens is 10" in failure.message
    assert answers.generation.is_idle


def test_damaged_weights_end_only_with_a_failure(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    answers = Answers(loaded)
    answers.add("nan", "Hi")
    answers.run()
    failure = answers.sent["nan"][-1].failure
    assert failure is not None
    assert "not finite" in failure.message


def test_a_tool_call_is_separated_from_the_text_before_it(loaded: LoadedModel) -> None:
    text = 'Let me see.<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
    tokens: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    options = AnswerOptions(temperature=0.0)
    choice = Choice.of_request("r", 0, [3], len(tokens), loaded, options, "hermes")
    pieces: list[Piece] = []
    for token in tokens:
        logits = torch.zeros(384)
        logits[token] = 1.0
        piece = choice.accept(logits)
        pieces += [] if piece is None else [piece]
    assert "".join(piece.text for piece in pieces) == "Let me see."
    assert len(pieces) > 5, "the text before a call is passed on at once"
    assert pieces[-1].finish_reason == "tool_calls"
    assert [(call.name, call.arguments) for call in pieces[-1].tool_calls] == [("weather", '{"city": "Ulm"}')]
