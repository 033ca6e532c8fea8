"""A tokenizer whose files make its library panic ends the run at once, as an invalid model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from zeta_core.contract.job.status import StatusReason
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import prepare_tokens
from zeta_core.failures import InvalidModel, explain
from zeta_core.report.reporter import Reporter

WORDS = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
ONIGURUMA = {"type": "Split", "pattern": {"Regex": "(a|aa|b|.)+$^"}, "behavior": "Isolated", "invert": False}
ABSENT_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


def tokenizer(folder: Path, **parts: Any) -> Any:
    """A tokenizer with these parts of ``tokenizer.json``."""
    folder.mkdir()
    content = {"version": "1.0", "added_tokens": [], "model": WORDS, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "PanicException: chunk size must be non-zero"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "PanicException: Precompiled"),
        ({"post_processor": ABSENT_TOKEN}, "PanicException: no entry found for key"),
        ({"pre_tokenizer": ONIGURUMA}, "PanicException: Onig: Regex search error"),
        ({"model": {**WORDS, "vocab": {"a": 0}}}, "Exception: WordLevel error: Missing .UNK. token"),
        ({"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}}, "unk_id` is missing"),
    ],
)
def test_a_tokenizer_that_panics_is_an_invalid_model(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abab abab bbbb aaaa aaaaaaa aaaaaaaaaaaaaaaaaaaaaaaaaa"}))
    options = parse(TrainerOptions, {"dataset": {"path": str(tmp_path / "a.jsonl")}})
    assert options.dataset is not None
    sources = open_sources(dataset_sources(options.dataset), SourceLocations(any_path=True), pretokenized=False)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a panic is not an `Exception`
        prepare_tokens(sources, tokenizer(tmp_path / "tokenizer", **parts), tmp_path / "cache", Reporter())
    reason, error = explain(caught.value)
    assert reason is StatusReason.INVALID_MODEL
    assert "The tokenizer failed: " in error.message
    assert re.search(message, error.message)
    assert error.hint is not None
    assert "use another tokenizer" in error.hint


def test_an_error_raised_elsewhere_is_not_blamed_on_the_tokenizer(tmp_path: Path) -> None:
    working = tokenizer(tmp_path / "tokenizer")
    assert working("a")["input_ids"] == [0]
    reason, _ = explain(ValueError("something else"))
    assert reason is StatusReason.TRAIN_ERROR
    assert explain(InvalidModel("as it is"))[1].message == "as it is"
