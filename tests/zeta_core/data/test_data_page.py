"""Every example of docs/data.md is read as documented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.zeta_core.data.chat_templates import CHATML, byte_tokenizer
from zeta_core.contract.data_files.file_types import DATA_SUFFIXES
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.report.reporter import Reporter

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"^`([\w.]+)`(?: with `(\{[^\n]*\})`)?:\n\n```\w*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def tokens_of(path: Path, settings: dict[str, Any]) -> TokenFile:
    dataset = {"path": str(path), **settings.pop("dataset", {})}
    options = parse(TrainerOptions, {"dataset": dataset, **settings})
    sources = open_sources(
        dataset_sources(options.dataset),
        SourceLocations(any_path=True),
        pretokenized=options.use_pretokenized,
        method=options.method,
    )
    cache = path.parent / "cache"
    return prepare_tokens(sources, byte_tokenizer(CHATML), cache, Reporter(), method=options.method)


def test_the_page_has_an_example_of_most_formats() -> None:
    assert len(EXAMPLES) == PAGE.count("\n```\n") - len(PYTHON)
    assert len({name for name, _, _ in EXAMPLES}) == len(EXAMPLES) >= 15
    for suffix in DATA_SUFFIXES:
        assert f"`{suffix}`" in PAGE


@pytest.mark.parametrize(("name", "settings", "content"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_an_example_of_the_page_is_read(name: str, settings: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    tokens = tokens_of(tmp_path / name, json.loads(settings or "{}"))
    assert tokens.num_documents >= 1
    if tokens.formats != ["text"]:
        assert tokens.supervised is not None
        assert 0 < tokens.supervised.sum() < tokens.num_tokens


@pytest.mark.extended
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))
    for code in PYTHON:
        exec(code, {})
    assert tokens_of(tmp_path / "ids.npy", {"use_pretokenized": True}).num_tokens == 300
    assert (tmp_path / "from_object" / "final").is_dir()
    assert (tmp_path / "from_folder" / "final").is_dir()
