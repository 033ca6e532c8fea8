"""The tables of docs/how-to/other-trainers.md agree with the names that a rejected spec suggests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zeta_core.contract.spec.job_spec import JobSpec
from zeta_core.contract.spec.options import Dpo, Kto, Lora
from zeta_core.contract.spec.other_names import OTHER_NAMES

PAGE = (Path(__file__).parents[3] / "docs" / "how-to" / "other-trainers.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", PAGE, re.MULTILINE)


def test_the_page_has_a_table_for_each_trainer() -> None:
    assert len(ROWS) > 50


@pytest.mark.parametrize(("theirs", "ours"), sorted(set(ROWS)))
def test_a_row_names_an_existing_field_that_errors_suggest(theirs: str, ours: str) -> None:
    field, _, inner = ours.partition(".")
    assert field in JobSpec.model_fields
    assert not inner or inner in {"lora": Lora, "dpo": Dpo, "kto": Kto}[field].model_fields
    assert OTHER_NAMES.get(theirs, theirs) == ours
