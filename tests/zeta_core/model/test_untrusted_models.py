"""Libraries see untrusted models as checked copies, without files of the machine, pickles or kernels."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.harness.model_archives import CONFIG, pack_tar, safetensors_file
from tests.zeta_core.models import LLAMA_CONFIG, llama
from tests.zeta_core.runs import train
from zeta_core.contract.job.events import WarningLine
from zeta_core.contract.spec.resolved_spec import UploadedFile
from zeta_core.contract.spec.sources import ConfigModel, FileModel, FileTokenizer, JobModel
from zeta_core.contract.wire.run_directory import checkpoint_key, file_key
from zeta_core.data.sources import SourceLocations
from zeta_core.failures import InvalidModel
from zeta_core.model.folders import IgnoredCode
from zeta_core.model.located_model import LocatedModel
from zeta_core.model.sources import locate_model
from zeta_core.model.tokenizer import locate_tokenizer

FILE, JOB = "file_" + "0" * 24, "job_" + "0" * 24
SECRET = "the-admin-key-of-this-machine"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "admin.key"
    path.write_text(f"{SECRET}\n[UNK]\n")
    return path


@pytest.fixture
def locations(tmp_path: Path) -> SourceLocations:
    return SourceLocations(
        artifacts_root=tmp_path / "artifacts", files={FILE: UploadedFile(filename="model.tar")}, allow_hub=False
    )


def stored_upload(locations: SourceLocations, files: Mapping[str, object]) -> FileModel:
    """An upload that a server stored without checking it."""
    assert locations.artifacts_root is not None
    path = locations.artifacts_root / file_key(FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack_tar(files))
    return FileModel(file=FILE)


def stored_checkpoint(locations: SourceLocations, files: Mapping[str, object]) -> JobModel:
    assert locations.artifacts_root is not None
    folder = locations.artifacts_root / checkpoint_key(JOB, "final")
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return JobModel(job=JOB, checkpoint="final")


def weights(tmp_path: Path, **changes: Any) -> bytes:
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in llama(**changes).state_dict().items()}, path)
    return path.read_bytes()


def rejection(located: Any) -> str:
    with pytest.raises(InvalidModel) as raised:
        located()
    return str(raised.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "vocab": "SECRET"}),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "vocab_file": "SECRET"}),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "init_inputs": ["SECRET"]}),
        ("special_tokens_map.json", {"vocab": "SECRET"}),
        ("special_tokens_map.json", {"vocab_file": "SECRET"}),
        ("tokenizer.json", {"model": {"type": "WordPiece", "vocab": "SECRET"}, "added_tokens": []}),
    ],
)
@pytest.mark.parametrize("where", ["upload", "checkpoint", "tokenizer"])
def test_a_tokenizer_never_contains_a_file_of_the_machine(
    file: str, content: dict[str, Any], where: str, secret: Path, locations: SourceLocations, tmp_path: Path
) -> None:
    named = json.loads(json.dumps(content).replace("SECRET", str(secret)))
    files: dict[str, object] = {
        "config.json": {**CONFIG, "model_type": "bert"},
        "model.safetensors": safetensors_file(),
    }
    files |= {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}, file: named}
    source: Any = stored_checkpoint(locations, files) if where == "checkpoint" else stored_upload(locations, files)
    if where == "tokenizer":
        located = locate_model(ConfigModel(config=LLAMA_CONFIG), locations, tmp_path)
        message = rejection(lambda: locate_tokenizer(FileTokenizer(file=FILE), located, locations, tmp_path / "cache"))
    else:
        message = rejection(lambda: locate_model(source, locations, tmp_path / "cache"))
    assert f": {file} has " in message
    assert str(secret)[:40] in message  # messages shorten long values
    assert not any(SECRET in path.read_text(errors="replace") for path in (tmp_path / "cache").rglob("*.json"))


def test_transformers_would_open_the_file_that_such_a_key_names(secret: Path, tmp_path: Path) -> None:
    """The attack that the checks prevent: without them, the lines of the file become tokens."""
    from transformers import AutoTokenizer

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "vocab": str(secret)})
    )
    assert SECRET in AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()


@pytest.mark.parametrize("shard", ["OTHER", "../other/model.safetensors", "weights.txt"])
def test_a_weight_map_cannot_refer_to_other_models(shard: str, locations: SourceLocations, tmp_path: Path) -> None:
    other = tmp_path / "other" / "model.safetensors"
    other.parent.mkdir()
    other.write_bytes(weights(tmp_path))
    names = list(llama().state_dict())
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard.replace("OTHER", str(other)))}
    torch.save(llama().state_dict(), tmp_path / "weights.txt")
    files: dict[str, object] = {"config.json": LLAMA_CONFIG, "model.safetensors.index.json": index}
    files["weights.txt"] = (tmp_path / "weights.txt").read_bytes()
    for source in (stored_upload(locations, files), stored_checkpoint(locations, files)):
        message = rejection(lambda source=source: locate_model(source, locations, tmp_path / "cache"))
        assert "model.safetensors.index.json has 'weight_map." in message
        assert "it must name a .safetensors file in the same folder" in message


def test_a_pickle_is_never_loaded_whatever_its_name(
    locations: SourceLocations, tmp_path: Path, monkeypatch: Any
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("torch.load was called")

    torch.save(llama().state_dict(), tmp_path / "weights.bin")
    pickled = (tmp_path / "weights.bin").read_bytes()
    monkeypatch.setattr(torch, "load", load)
    message = rejection(
        lambda: locate_model(
            stored_upload(locations, {"config.json": LLAMA_CONFIG, "model.safetensors": pickled}),
            locations,
            tmp_path / "c1",
        )
    )
    assert "model.tar: model.safetensors is not a safetensors file" in message
    files = {"config.json": LLAMA_CONFIG, "pytorch_model.bin": pickled, "adapter_model.bin": pickled}
    message = rejection(lambda: locate_model(stored_upload(locations, files), locations, tmp_path / "c2"))
    assert "has no model.safetensors" in message
    assert not list((tmp_path / "c2").rglob("*.bin"))


def test_an_adapter_without_safetensors_is_rejected(locations: SourceLocations, tmp_path: Path) -> None:
    files = {
        "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "org/base"},
        "adapter_model.bin": b"a pickle",
    }
    model = stored_checkpoint(locations, files)
    message = rejection(lambda: locate_model(model, locations, tmp_path / "cache"))
    assert message == f"{JOB}/final has no adapter_model.safetensors; save the adapter with save_pretrained."


@pytest.mark.parametrize("link", ["vocab.txt", "config.json", "model.safetensors"])
def test_a_link_out_of_a_checkpoint_is_rejected(
    link: str, secret: Path, locations: SourceLocations, tmp_path: Path
) -> None:
    model = stored_checkpoint(locations, {"config.json": LLAMA_CONFIG, "model.safetensors": safetensors_file()})
    assert locations.artifacts_root is not None
    path = locations.artifacts_root / checkpoint_key(JOB, "final") / link
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    message = rejection(lambda: locate_model(model, locations, tmp_path / "cache"))
    assert message == f"{JOB}/final contains {link!r}, a link to a file outside; copy that file."


@pytest.mark.parametrize("source", ["job", "local directory"])
def test_code_of_a_model_is_ignored_with_a_warning(source: str, locations: SourceLocations, tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}
    files: dict[str, Any] = {"config.json": config, "model.safetensors": weights(tmp_path), "theirs.py": b"1 / 0"}
    files["generation_config.json"] = {"eos_token_id": 1, "custom_generate": "theirs"}
    model: Any = stored_checkpoint(locations, files)
    if source == "local directory":
        assert locations.artifacts_root is not None
        model, locations = (
            str(locations.artifacts_root / checkpoint_key(JOB, "final")),
            SourceLocations(any_path=True, allow_hub=False),
        )
    for number in range(2):  # the second run uses the checked copy of the first
        outcome, lines = train(
            model, tmp_path / f"out-{number}", cache=tmp_path / "cache", max_steps=1, locations=locations
        )
        assert outcome.steps_trained == 1
        (warning,) = [line for line in lines.all if isinstance(line, WarningLine) and line.code == "model_code_ignored"]
        assert "auto_map in config.json, custom_generate in generation_config.json" in warning.message
        name = model if isinstance(model, str) else f"{JOB}/final"
        keys = {"config.json": ["auto_map"], "generation_config.json": ["custom_generate"]}
        assert warning.evidence == {"model": name, "keys": keys}
        assert warning.message.startswith(f"{name} refers to code of its own")


def test_code_of_an_adapters_base_and_of_a_named_tokenizer_is_reported(
    locations: SourceLocations, tmp_path: Path
) -> None:
    base = stored_checkpoint(locations, {"config.json": {**LLAMA_CONFIG, "auto_map": {"AutoConfig": "theirs.Config"}}})
    assert locations.artifacts_root is not None
    adapter = locations.artifacts_root / checkpoint_key(JOB, "step-1")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": f"{base.job}/{base.checkpoint}"})
    )
    ignored: list[IgnoredCode] = []
    locations = replace(locations, fetch_weights=False)
    model = JobModel(job=JOB, checkpoint="step-1")
    located = locate_model(model, locations, tmp_path / "cache", on_ignored=ignored.append)
    assert ignored == [IgnoredCode(f"{JOB}/final", {"config.json": ["auto_map"]})]

    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    named = {"tokenizer_class": "ByT5Tokenizer", "auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(named))
    scripts = SourceLocations(any_path=True)
    locate_tokenizer(str(tokenizer), located, scripts, tmp_path / "cache", on_ignored=ignored.append)
    assert ignored[1:] == [IgnoredCode(str(tokenizer), {"tokenizer_config.json": ["auto_map"]})]


def test_a_model_without_code_gives_no_warning(locations: SourceLocations, tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "auto_map": {}, "trust_remote_code": False}
    model = stored_checkpoint(locations, {"config.json": config, "model.safetensors": weights(tmp_path)})
    _, lines = train(model, tmp_path / "out", cache=tmp_path / "cache", max_steps=1, locations=locations)
    assert "model_code_ignored" not in [line.code for line in lines.all if isinstance(line, WarningLine)]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that transformers would load from the Hub, as if the package `kernels` were installed."""
    from transformers import modeling_utils
    from transformers.integrations import hub_kernels

    loaded: list[str] = []

    def load(name: str, *_: object, **__: object) -> None:
        loaded.append(name)
        raise ImportError(name)

    monkeypatch.setattr(hub_kernels, "get_kernel", load)
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", load)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", load)
    return loaded


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("where", ["upload", "checkpoint", "config"])
def test_no_config_reaches_a_kernel_loader(
    key: str, where: str, locations: SourceLocations, tmp_path: Path, no_kernels: list[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**LLAMA_CONFIG, key: "owner/kernel"}
    with pytest.raises(ImportError, match="owner/kernel"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert no_kernels == ["owner/kernel"], "without the checks, the kernel is loaded"
    no_kernels.clear()
    files = {"config.json": config, "model.safetensors": weights(tmp_path)}
    model: Any = ConfigModel(config=config)
    if where != "config":
        model = stored_upload(locations, files) if where == "upload" else stored_checkpoint(locations, files)
    message = rejection(lambda: locate_model(model, locations, tmp_path / "cache").build())
    assert f"{key}" in message
    assert "third-party kernels are never loaded" in message
    assert no_kernels == []


def located_upload(locations: SourceLocations, tmp_path: Path, files: Mapping[str, object]) -> LocatedModel:
    return locate_model(stored_upload(locations, files), locations, tmp_path / "cache")


def test_an_uploaded_model_is_loaded_unchanged(locations: SourceLocations, tmp_path: Path) -> None:
    """A sharded model with its own tokenizer and the other files of a real directory."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model: Any = llama(vocab_size=8)
    model.config.auto_map = None
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    words = {"<unk>": 0, "a/b": 1, "/etc/passwd": 2, "</s>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "trainer_state.json").write_text('{"best_model_checkpoint": "/tmp/x"}')
    (tmp_path / "model" / "training_args.bin").write_bytes(b"\x80\x04K\x01.")
    files: dict[str, object] = {f"a/{path.name}": path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    located = located_upload(locations, tmp_path, files)
    built, expected = located.build().state_dict(), model.state_dict()
    assert built.keys() == expected.keys()
    assert all(torch.equal(built[name], tensor) for name, tensor in expected.items())
    again = locate_tokenizer(None, located, locations, tmp_path / "cache")
    assert again.get_vocab() == words
    assert (again.eos_token, again.chat_template) == ("</s>", tokenizer.chat_template)
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_checkpoint_is_a_base_again_and_is_linked_not_copied(locations: SourceLocations, tmp_path: Path) -> None:
    train(llama(), tmp_path / "out", cache=tmp_path, max_steps=1)
    assert locations.artifacts_root is not None
    stored = locations.artifacts_root / checkpoint_key(JOB, "final")
    stored.parent.mkdir(parents=True)
    (tmp_path / "out" / "final").rename(stored)
    model = JobModel(job=JOB, checkpoint="final")
    located = locate_model(model, locations, tmp_path / "cache")
    (copied,) = (tmp_path / "cache").rglob("*.safetensors")
    assert copied.is_symlink()
    assert os.path.samefile(copied, stored / "model.safetensors")
    assert locate_model(model, locations, tmp_path / "cache").directory == located.directory, "the copy is created once"
    located.build()
    outcome, _ = train(model, tmp_path / "next", cache=tmp_path / "cache", max_steps=1, locations=locations)
    assert outcome.steps_trained == 1
