"""Adapters of one base share it: it is in memory once, and each adapter answers as it does alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zeta_core.serve.stored_models import Store
from zeta_core.contract.wire.answers import AddAdapter, AnswerOptions, Generate, Generated, Prompt
from zeta_core.failures import InvalidModel
from zeta_core.serve.generations import Generations
from zeta_core.serve.loading import LoadedModel

TEXTS = ["Which river?", "Who goes there, and why so late at night?", "a"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


class Answers:
    """The answers of one process with its adapters."""

    def __init__(self, loaded: LoadedModel, *, is_base: bool = False) -> None:
        self._texts: dict[str, str] = {}
        self.generations = Generations(loaded, self._receive, is_base=is_base)

    def add(self, store: Store, folder: Path, *, is_base: bool = False, **fields: Any) -> None:
        of_base = {"base_of_adapters": "hash"} if is_base else {"has_manifest": True}
        file = store.serve_file(folder, **of_base, **fields)
        self.generations.add_adapter(AddAdapter(key=str(folder), file=file))

    def all(self, *adapters: Path | None) -> dict[str, str]:
        """The greedy answers of each adapter to each text, all of them computed at the same time."""
        self._texts = {}
        for adapter in adapters:
            for text in TEXTS:
                options = AnswerOptions(temperature=0.0, max_tokens=24)
                key = None if adapter is None else str(adapter)
                request_id = f"{key}: {text}"
                self._texts[request_id] = ""
                self.generations.add(
                    Generate(request_id=request_id, adapter=key, prompt=Prompt(text=text), options=options)
                )
        while not self.generations.is_idle:
            self.generations.step()
        return self._texts

    def _receive(self, sent: Generated) -> None:
        assert sent.failure is None, sent.failure
        self._texts[sent.request_id] += "".join(piece.text for piece in sent.pieces)


def alone(store: Store, folder: Path, *, has_manifest: bool = True, **fields: Any) -> list[str]:
    return list(Answers(store.load(folder, has_manifest=has_manifest, **fields)).all(None).values())


def num_bytes(model: torch.nn.Module) -> int:
    parts = {part.data_ptr(): part for part in (*model.parameters(), *model.buffers())}
    return sum(part.numel() * part.element_size() for part in parts.values())


def adapter_bytes(folders: Sequence[Path]) -> int:
    return sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)


@pytest.mark.parametrize(
    "quantize",
    [
        None,
        pytest.param(
            "nf4", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
        ),
    ],
)
def test_adapters_answer_together_as_alone_with_one_base(store: Store, quantize: str | None) -> None:
    kinds: list[dict[str, Any]] = [{}, {"use_dora": True, "r": 2}, {"target_modules": ["q_proj"], "r": 8}]
    rate = {"learning_rate": 0.03}
    adapters = [
        store.adapter(steps=8, options={**rate, "seed": seed}, quantize=quantize, **kind)
        for seed, kind in enumerate(kinds)
    ]
    expected = [alone(store, adapter, quantize=quantize) for adapter in adapters]
    assert len({tuple(texts) for texts in expected}) == 3, "the adapters have learned different things"

    loaded = store.load(adapters[0], has_manifest=True, quantize=quantize)
    answers = Answers(loaded)
    before = num_bytes(loaded.model)
    for adapter in adapters[1:]:
        answers.add(store, adapter, quantize=quantize)
    added = num_bytes(loaded.model) - before
    assert 0 < added <= adapter_bytes(adapters[1:]) < 0.5 * before

    found = answers.all(None, *adapters[1:])
    assert list(found.values()) == [text for texts in expected for text in texts]
    assert list(answers.all(adapters[2]).values()) == expected[2]


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_the_base_answers_beside_its_adapters_as_it_does_alone(store: Store, is_first: bool) -> None:
    adapters = [store.adapter(steps=8, options={"learning_rate": 0.03, "seed": seed}) for seed in range(2)]
    expected = [alone(store, folder, has_manifest=folder != store.base) for folder in (store.base, *adapters)]
    assert len({tuple(texts) for texts in expected}) == 3

    order = [store.base, *adapters] if is_first else [adapters[0], store.base, adapters[1]]
    loaded = store.load(order[0], has_manifest=not is_first)
    answers = Answers(loaded, is_base=is_first)
    before = num_bytes(loaded.model)
    for folder in order[1:]:
        answers.add(store, folder, is_base=folder == store.base)
    assert num_bytes(loaded.model) - before <= adapter_bytes(adapters), "the base is in memory once"
    found = answers.all(*(None if folder == order[0] else folder for folder in order))
    by_folder = dict(zip((store.base, *adapters), expected, strict=True))
    assert list(found.values()) == [text for folder in order for text in by_folder[folder]]


def test_an_adapter_that_does_not_fit_leaves_the_others_unchanged(store: Store) -> None:
    first, second = store.adapter(options={"learning_rate": 0.03}), store.adapter()
    expected = alone(store, first)
    answers = Answers(store.load(first, has_manifest=True))
    config = second / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 3'))
    with pytest.raises(RuntimeError, match="size mismatch"):
        answers.add(store, second)
    assert list(answers.all(None).values()) == expected
    with pytest.raises(InvalidModel, match="the loaded model has none"):
        Answers(store.load(store.base)).add(store, first)
