"""Extreme values that are valid JSON are errors of the user, not of the server that computes with them."""

import pytest

from zeta_core.contract.errors import ZetaError
from zeta_core.contract.job.sweep import SweepRequest
from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.validation import parse

SPEC = {"model": "org/name", "dataset": {"file": "file_" + "0" * 24}}


def test_a_memory_that_no_gpu_has_is_refused() -> None:
    """The scheduler converted it to a float, which failed and kept the jobs of all users waiting."""
    with pytest.raises(ZetaError) as raised:
        parse(JobSpec, {**SPEC, "resources": {"min_gpu_memory": 10**399}})
    assert raised.value.param == "resources.min_gpu_memory"


def test_the_name_of_a_field_in_a_grid_has_a_limited_depth() -> None:
    """A deeper spec could not be encoded as JSON."""
    with pytest.raises(ZetaError, match="grid has the field"):
        parse(SweepRequest, {"spec": SPEC, "grid": {"a." * 5000 + "b": [1]}})
