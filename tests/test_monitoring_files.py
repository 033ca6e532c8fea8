"""The Grafana dashboard and the documented queries use metrics and labels that a server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.harness.reference_pages.metrics import metric_labels, series_names

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "zeta.json"
MONITORING_PAGE = ROOT / "docs" / "operations" / "monitoring.md"
ADDED_BY_PROMETHEUS = {"instance", "job", "le"}


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def dashboard_queries() -> list[str]:
    panels = dashboard()["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def documented_queries() -> list[str]:
    return re.findall(r"^ *expr: (.+)$", MONITORING_PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("query", [*dashboard_queries(), *documented_queries()])
def test_a_query_uses_existing_metrics_and_labels(query: str) -> None:
    names = set(re.findall(r"zeta_\w+", query))
    assert names, "it has no metric"
    assert names - series_names() == set()
    selected = re.findall(r"(\w+)=~?\"", query)
    grouped = [label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")]
    labels = {label for name in names for label in metric_labels(name)}
    assert {*selected, *grouped} - labels - ADDED_BY_PROMETHEUS == set()


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for query in dashboard_queries() for name in re.findall(r"zeta_\w+", query)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series_names()}
    assert families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_every_panel_has_its_own_place_and_explanation() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"] and panel["title"] for panel in panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
