"""Half precision on a CPU, of computation, weights and optimizer states; the loss scale of fp16; non-finite values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.zeta_core import runs
from tests.zeta_core.models import PlainModel, llama
from zeta import Trainer
from zeta_core.contract.job.status import StatusReason
from zeta_core.failures import CannotResume, NonFiniteLoss

SETTINGS: dict[str, Any] = {"seq_len": 32, "batch_size": 4, "learning_rate": 1e-2, "lr_scheduler": "constant"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZETA_HOME", str(tmp_path / "home"))


@pytest.mark.extended
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_float32_and_resumes_to_the_bit(precision: str, tmp_path: Path) -> None:
    reference = Trainer(model=llama(), max_steps=4, output_dir=tmp_path / "float32", **SETTINGS)
    settings: dict[str, Any] = {**SETTINGS, "mixed_precision": precision}
    straight, resumed = llama(), llama()
    computed_in: set[torch.dtype] = set()
    head = straight.get_submodule("lm_head")
    watching = head.register_forward_hook(lambda _module, _inputs, logits: computed_in.add(logits.dtype))
    result = Trainer(model=straight, max_steps=4, output_dir=tmp_path / "straight", **settings)
    watching.remove()
    assert {"bf16": torch.bfloat16, "fp16": torch.float16}[precision] in computed_in
    assert result.train_loss == pytest.approx(reference.train_loss, abs=2e-2)
    out = tmp_path / "out"
    Trainer(model=llama(), max_steps=2, output_dir=out, **settings)
    Trainer(model=resumed, max_steps=4, output_dir=out, resume_from_checkpoint=out, **settings)
    for parameter, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, other)


class Steep(PlainModel):
    """Finite gradients that exceed the range of fp16 when multiplied by the initial loss scale of 65,536."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 30 * super().forward(ids)


def test_an_overflowing_step_is_repeated_and_the_scale_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    out = tmp_path / "out"
    result = Trainer(model=Steep(), max_steps=3, output_dir=out, mixed_precision="fp16", **SETTINGS)
    assert "The gradient of step 1 overflowed fp16; repeating it with loss scale 32,768." in capsys.readouterr().out
    assert (result.steps, result.tokens) == (3, 3 * 4 * 32), "no step and no token is lost"
    state = json.loads((out / "final" / "training_state" / "state.json").read_text())
    scale = state["optimizer_values"]["loss_scale"]["scale"]
    assert 1 <= scale < 65_536
    again = Trainer(
        model=Steep(), max_steps=4, output_dir=out, mixed_precision="fp16", resume_from_checkpoint=out, **SETTINGS
    )
    assert again.steps_trained == 1
    state = json.loads((out / "final" / "training_state" / "state.json").read_text())
    assert state["optimizer_values"]["loss_scale"]["scale"] <= scale, "the search for the scale did not start again"


def test_a_stop_during_an_overflow_waits_for_the_step_and_its_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome, _ = runs.train(
        Steep(),
        out,
        cache=tmp_path,
        stop=lambda: "pause",
        max_steps=3,
        mixed_precision="fp16",
    )
    assert (outcome.stopped, outcome.steps_trained) == ("pause", 1)
    assert outcome.checkpoint == out / "step-1"


class Broken(PlainModel):
    """A finite loss whose gradient is not a number."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        return logits + torch.sqrt(0 * self.blocks[0].norm.bias.sum())  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportCallIssue, reportOptionalMemberAccess]


class Unbounded(PlainModel):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * float("inf")


@pytest.mark.parametrize(
    ("model", "precision", "what"),
    [(Broken, "no", "gradient"), (Broken, "fp16", "gradient"), (Unbounded, "no", "loss"), (Unbounded, "fp16", "loss")],
)
def test_values_that_are_not_finite_end_the_run_before_the_update(
    model: type[PlainModel], precision: str, what: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    trained = model()
    before = [parameter.detach().clone() for parameter in trained.parameters()]
    with pytest.raises(NonFiniteLoss, match=f"The {what} of step 1 is not finite") as raised:
        Trainer(model=trained, max_steps=2, output_dir=tmp_path / "out", mixed_precision=precision, **SETTINGS)
    assert raised.value.reason is StatusReason.NON_FINITE_LOSS
    assert ("bf16" in (raised.value.hint or "")) == (precision == "fp16")
    assert all(torch.equal(old, new) for old, new in zip(before, trained.parameters(), strict=True))
    assert not list((tmp_path / "out").glob("step-*"))


@pytest.mark.extended
@pytest.mark.parametrize("sharding", [{}, {"use_fsdp": True}], ids=["whole", "fsdp"])
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_compact_optimizer_states_train_like_float32_ones_and_resume_to_the_bit(
    states: str, sharding: dict[str, Any], tmp_path: Path
) -> None:
    given: dict[str, Any] = {**SETTINGS, **sharding}
    settings: dict[str, Any] = {**given, "optimizer_states": states}
    reference = Trainer(model=llama(), max_steps=4, output_dir=tmp_path / "float32", **given)
    straight, resumed = llama(), llama()
    result = Trainer(model=straight, max_steps=4, output_dir=tmp_path / "straight", **settings)
    assert result.train_loss == pytest.approx(reference.train_loss, abs=2e-3)
    out = tmp_path / "out"
    Trainer(model=llama(), max_steps=2, output_dir=out, **settings)
    Trainer(model=resumed, max_steps=4, output_dir=out, resume_from_checkpoint=out, **settings)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    files = list((tmp_path / "straight" / "final" / "training_state").glob("optimizer*.safetensors"))
    moments = {tensor.dtype for name, tensor in load_file(files[0]).items() if "exp_avg" in name}
    assert moments == ({torch.bfloat16} if states == "bf16" else {torch.uint8, torch.float32})
    with pytest.raises(CannotResume, match=f"optimizer_states is 'float32', but the run was started with '{states}'"):
        Trainer(model=llama(), max_steps=6, resume_from_checkpoint=out, optimizer_states="float32", **given)


@pytest.mark.extended
@pytest.mark.parametrize("sharding", [{}, {"use_fsdp": True}], ids=["whole", "fsdp"])
@pytest.mark.parametrize(("rounding", "states"), [("stochastic", "8bit"), ("kahan", "float32")])
def test_bf16_weights_train_like_float32_ones_and_resume_to_the_bit(
    rounding: str, states: str, sharding: dict[str, Any], tmp_path: Path
) -> None:
    given: dict[str, Any] = {**SETTINGS, **sharding, "mixed_precision": "bf16"}
    settings: dict[str, Any] = {**given, "bf16_weights": rounding, "optimizer_states": states}
    reference = Trainer(model=llama(), max_steps=4, output_dir=tmp_path / "float32", **given)
    straight, resumed = llama(), llama()
    result = Trainer(model=straight, max_steps=4, output_dir=tmp_path / "straight", **settings)
    assert result.train_loss == pytest.approx(reference.train_loss, abs=1e-2)
    assert {parameter.dtype for parameter in straight.parameters()} == {torch.bfloat16}
    out = tmp_path / "out"
    Trainer(model=llama(), max_steps=2, output_dir=out, **settings)
    Trainer(model=resumed, max_steps=4, output_dir=out, resume_from_checkpoint=out, **settings)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    settings["bf16_weights"] = {"kahan": "stochastic", "stochastic": "kahan"}[rounding]
    with pytest.raises(CannotResume, match=f"bf16_weights is '.*', but the run was started with '{rounding}'"):
        Trainer(model=llama(), max_steps=6, output_dir=out, resume_from_checkpoint=out, **settings)
