"""The end token that the data teaches is in the saved generation config, and a missing one is a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoModelForCausalLM

from tests.zeta_core.data.chat_templates import CHATML, GEMMA, LLAMA3, MISTRAL, PHI3, QWEN3, byte_tokenizer
from tests.zeta_core.models import LLAMA_CONFIG, llama
from tests.zeta_core.runs import RecordedLines, train
from zeta_core.contract.job.events import LogLine, WarningLine
from zeta_core.contract.spec.sources import ConfigModel

CHATS = [
    {"messages": [{"role": "user", "content": f"Twice {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]}
    for n in range(8)
]


def rows_in(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(path)}


def base_in(folder: Path, tokenizer: Any, **config: Any) -> Path:
    saved: Any = llama(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **config)
    saved.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def config_of(folder: Path, name: str = "generation_config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def warning_codes(lines: RecordedLines) -> list[str]:
    return [line.code for line in lines.all if isinstance(line, WarningLine)]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (QWEN3, "<|im_end|>"),
        (PHI3, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (MISTRAL, "<|end|>"),
        (None, "<|im_end|>"),
    ],
)
def test_the_end_of_a_templates_turns_ends_generation(template: str | None, end: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template)
    base, data = base_in(tmp_path, tokenizer), rows_in(tmp_path, CHATS)
    _, lines = train(str(base), tmp_path / "out", cache=tmp_path, dataset=data, seq_len=256, max_steps=1)
    taught, own = tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id
    expected = taught if taught == own else [taught, own]
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert loaded.generation_config.eos_token_id == expected
    assert "no_end_token" not in warning_codes(lines)
    logged = [line.message for line in lines.all if isinstance(line, LogLine) and "ends generation" in line.message]
    assert len(logged) == (taught != own)


def test_an_added_token_without_the_special_flag_can_end_a_turn(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ m.content + '<stop>\n' }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer.add_tokens([AddedToken("<stop>", special=False)])
    base, data = base_in(tmp_path, tokenizer), rows_in(tmp_path, CHATS)
    train(str(base), tmp_path / "out", cache=tmp_path, dataset=data, max_steps=1)
    ends = config_of(tmp_path / "out" / "final")["eos_token_id"]
    assert ends == [tokenizer.convert_tokens_to_ids("<stop>"), tokenizer.eos_token_id]


def test_known_end_tokens_of_a_pretrained_model_are_kept(tmp_path: Path) -> None:
    """Except those that are ordinary text in the tokenizer, which would cut an answer short."""
    tokenizer = byte_tokenizer(CHATML)
    base = base_in(tmp_path, tokenizer)
    kept, letter = tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer("e").input_ids[0]
    config = config_of(base)
    (base / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [letter, kept], "top_k": 20}))
    train(str(base), tmp_path / "out", cache=tmp_path, dataset=rows_in(tmp_path, CHATS), max_steps=1)
    saved = config_of(tmp_path / "out" / "final")
    assert saved["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id, kept]
    assert saved["top_k"] == 20
    assert config_of(tmp_path / "out" / "final", "config.json")["eos_token_id"] == tokenizer.eos_token_id


def test_a_model_from_scratch_gets_the_special_tokens_of_its_tokenizer(tmp_path: Path) -> None:
    data = rows_in(tmp_path, [{"text": f"The number {n}."} for n in range(20)])
    _, lines = train(ConfigModel(config=LLAMA_CONFIG), tmp_path / "out", cache=tmp_path, dataset=data, max_steps=1)
    final = tmp_path / "out" / "final"
    for name in ("generation_config.json", "config.json"):
        about = config_of(final, name)
        found = [about.get(f"{kind}_token_id") for kind in ("eos", "bos", "pad")]
        assert found == [1, None, 0], "the tokens of the byte-level tokenizer, not those of Llama"
    loaded: Any = AutoModelForCausalLM.from_pretrained(final)
    assert loaded.generation_config.eos_token_id == 1
    assert "no_end_token" not in warning_codes(lines)
    logged = [line.message for line in lines.all if isinstance(line, LogLine) and "ends generation" in line.message]
    assert logged == [], "the user chose no end token, so none was changed"


def test_a_padding_token_that_ends_documents_keeps_its_gradient(tmp_path: Path) -> None:
    """torch gives no gradient to the embedding of a config's padding token."""
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = ConfigModel(config={**LLAMA_CONFIG, "vocab_size": len(tokenizer)})
    data = rows_in(tmp_path, CHATS)
    train(model, tmp_path / "out", cache=tmp_path, dataset=data, max_steps=1, tokenizer=str(tmp_path / "tokenizer"))
    assert config_of(tmp_path / "out" / "final")["pad_token_id"] == tokenizer.eos_token_id
    assert config_of(tmp_path / "out" / "final", "config.json")["pad_token_id"] is None


@pytest.mark.extended
def test_an_adapter_has_the_generation_config_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    base, data = base_in(tmp_path, tokenizer), rows_in(tmp_path, CHATS)
    options: dict[str, Any] = {"cache": tmp_path, "dataset": data, "max_steps": 1}
    train(str(base), tmp_path / "adapter", lora={"r": 2, "save_merged": True}, **options)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    final = tmp_path / "adapter" / "final"
    for folder in (final, final / "merged"):
        assert config_of(folder)["eos_token_id"] == ends
    assert "GenerationConfig.from_pretrained(directory)" in (final / "README.md").read_text()
    train(str(base), tmp_path / "alone", lora={"r": 2}, **options)
    texts = rows_in(tmp_path, [{"text": "It is 12."}] * 4)
    train(str(tmp_path / "alone" / "final"), tmp_path / "next", cache=tmp_path, dataset=texts, max_steps=1)
    found = config_of(tmp_path / "next" / "final")["eos_token_id"]
    assert set(found) == set(ends), "the model with the adapter ends at the same tokens"


@pytest.mark.parametrize("kind", ["text", "messages", "tokens"])
def test_data_without_an_end_token_is_a_warning(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    base = base_in(tmp_path, tokenizer)
    if kind == "text":  # documents get no end token
        tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids: list[int] = tokenizer("It is 12.").input_ids
    rows = {"text": [{"text": "It is 12."}] * 8, "messages": CHATS, "tokens": [{"input_ids": ids}] * 8}[kind]
    _, lines = train(
        str(base),
        tmp_path / "out",
        cache=tmp_path,
        dataset=rows_in(tmp_path, rows),
        tokenizer=str(tmp_path / "tokenizer"),
        use_pretokenized=kind == "tokens",
        max_steps=1,
    )
    [warning] = [line for line in lines.all if isinstance(line, WarningLine) and line.code == "no_end_token"]
    assert warning.message.startswith(f"None of the {'answers' if kind == 'messages' else 'documents'}")
    before = config_of(base)["eos_token_id"]
    assert config_of(tmp_path / "out" / "final")["eos_token_id"] == before


def test_token_ids_without_a_tokenizer_leave_the_configurations_alone(tmp_path: Path) -> None:
    data = rows_in(tmp_path, [{"input_ids": [5, 6, 7, 8, 9]}] * 8)
    model = ConfigModel(config={**LLAMA_CONFIG, "eos_token_id": 9, "bos_token_id": 4})
    _, lines = train(model, tmp_path / "out", cache=tmp_path, dataset=data, use_pretokenized=True, max_steps=1)
    saved = config_of(tmp_path / "out" / "final")
    assert (saved["eos_token_id"], saved["bos_token_id"]) == (9, 4)
    assert "no_end_token" not in warning_codes(lines)
