"""Concurrent copies of a run's state contain the values at the time of the request."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.zeta_core.models import PlainModel, plain
from zeta_core.checkpoint.staging import Staging
from zeta_core.checkpoint.training_state import optimizer_tensors
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.environment import ProcessRank
from zeta_core.failures import InvalidModel
from zeta_core.parallel.processes import Processes, Replicated
from zeta_core.plan import Plan, PlanInputs, decide_plan

KINDS = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def various_tensors() -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and sizes; one is copied in several pieces, and one is not contiguous."""
    torch.manual_seed(1)
    tensors = {str(kind): (torch.rand(3, 5) * 100).to(kind) for kind in KINDS}
    large = torch.arange(20_000_003, dtype=torch.int16)
    return tensors | {"large": large, "one": torch.tensor(7.0), "none": torch.empty(0, 4), "turned": torch.rand(4, 6).T}


def test_threads_share_a_copy_that_the_next_update_does_not_change() -> None:
    staging, tensors = Staging(), various_tensors()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    staging.reserve("model/", tensors)
    places: list[list[int]] = []
    for _ in range(2):  # the second time into the same buffers
        staged = staging.copy_later("model/", tensors)
        threads = [threading.Thread(target=staging.finish) for _ in range(3)]
        for thread in threads:
            thread.start()
        staging.finish()
        for tensor in tensors.values():  # the update
            tensor.zero_()
        for thread in threads:
            thread.join()
        for name, tensor in expected.items():
            assert torch.equal(staged[name], tensor)
            tensors[name].copy_(tensor)
        places.append([tensor.data_ptr() for tensor in staged.values()])
    assert places[0] == places[1]


def test_writing_to_a_tensor_while_it_is_copied_fails_the_save() -> None:
    staging, tensors = Staging(), various_tensors()
    staging.copy_later("model/", tensors)
    tensors["one"].add_(1)
    with pytest.raises(InvalidModel, match="its parameter one outside the optimizer's update"):
        staging.finish()


def test_reserving_stops_when_the_buffers_are_needed() -> None:
    staging, tensors = Staging(), various_tensors()
    staging.stop_reserving()
    staging.reserve("model/", tensors)
    staged = staging.copy_later("model/", tensors)
    staging.finish()
    assert torch.equal(staged["large"], tensors["large"])


class Counting(PlainModel):
    """Changes a parameter and a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.calls.add_(1)
            self.seen.add_(1)
        return super().forward(ids)


@pytest.fixture
def replicated() -> Iterator[list[Replicated]]:
    engines: list[Replicated] = []
    yield engines
    for engine in engines:
        engine.close()


def one_step(model: nn.Module, engines: list[Replicated]) -> Replicated:
    engine = Replicated(model, _plan(), Processes(ProcessRank(), need_group=False), blocks=[])
    engines.append(engine)
    engine.backward(engine.model(torch.ones(1, 4, dtype=torch.int64)).sum())
    engine.update(0.1)
    return engine


def _plan() -> Plan:
    options = TrainerOptions.model_validate(
        {"batch_size": 1, "gradient_accumulate_every": 1, "seq_len": 4, "max_steps": 1}
    )
    facts = PlanInputs(1, "cpu", False, 1, 4, 1, 1 << 30, True, "data")
    return decide_plan(options, facts, None)


@pytest.mark.parametrize("model", [plain, Counting])
def test_a_snapshot_has_the_state_of_its_step_whatever_a_forward_changes(
    model: type[nn.Module], replicated: list[Replicated]
) -> None:
    engine, staging = one_step(model(), replicated), Staging()
    weights = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    moments = {key: t.clone() for key, t in optimizer_tensors(engine.optimizer, engine.module)[0].items()}
    staged, (optimizer, _) = engine.stage_weights(staging, weights), engine.stage_optimizer(staging)
    engine.backward(engine.model(torch.ones(1, 4, dtype=torch.int64)).sum())
    staging.finish()
    engine.update(0.1)
    assert staged.keys() == weights.keys()
    assert all(torch.equal(staged[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(optimizer[key], tensor) for key, tensor in moments.items())
    assert not torch.equal(staged["embedding.weight"], engine.module.state_dict()["embedding.weight"])
