"""The Grafana board, without a server: what it asks is well formed and its check sees what is missing.

tests/server and tests/plugin hold its queries against what vLLM exports.
"""

from __future__ import annotations

import json
from typing import Any

import promql_parser as promql
import pytest
import yaml

from .board import BOARD, exported, labels, metrics, queries

SCRAPE = """\
# TYPE a_total counter
a_total{engine="0",model="m"} 1
# TYPE h histogram
h_bucket{engine="0",le="1"} 1
h_bucket{engine="0",le="+Inf"} 1
h_sum{engine="0"} 1
h_count{engine="0"} 1
# TYPE info gauge
info{engine="0",dtype="auto"} 1
"""


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("a_total", {"engine", "model", "instance", "job"}),
        ('rate(a_total{model="m"}[1m])', {"engine", "model", "instance", "job"}),
        ("sum by (dtype) (rate(a_total[1m]) * on (instance, engine) group_left (dtype) info)", {"dtype"}),
        ("histogram_quantile(0.5, sum by (le, engine) (rate(h_bucket[1m])))", {"engine"}),
        ("sum by (engine) (a_total) / sum by (engine) (info)", {"engine"}),
        ("b_total", "no metric b_total"),
        ("a", "no metric a"),
        ('a_total{dtype="auto"}', "no label dtype"),
        ("sum by (dtype) (a_total)", "no label dtype"),
        ("a_total * on (instance, rank) group_left (dtype) info", "no label rank"),
        ("a_total * on (engine) group_left (colour) info", "no label colour"),
        ("histogram_quantile(0.5, sum by (engine) (rate(h_bucket[1m])))", "no label le"),
    ],
)
def test_labels_of_a_query(query: str, expected: set[str] | str) -> None:
    known = exported(SCRAPE)
    if isinstance(expected, set):
        assert labels(promql.parse(query), known) == expected
    else:
        with pytest.raises(LookupError, match=expected):
            labels(promql.parse(query), known)


def test_queries_are_of_vllm_alone_and_tell_dtypes_apart() -> None:
    found = queries()
    used = {name for query in found for name in metrics(query.parsed)}
    print(f"{len(found)} queries of {len(used)} metrics")
    assert len(found) >= 12 and all(name.startswith("vllm:") for name in used)
    assert all("cache_dtype" in query.shown for query in found)


def panels() -> list[dict[str, Any]]:
    return json.loads(BOARD.read_text())["panels"]  # type: ignore[no-any-return]


def test_panels_lie_side_by_side() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels())
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_grafana_is_told_of_prometheus_and_the_board() -> None:
    (source,) = yaml.safe_load((BOARD.parents[1] / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((BOARD.parent / "provider.yaml").read_text())["providers"]
    compose = yaml.safe_load((BOARD.parents[3] / "compose.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts["./monitoring/grafana/dashboards"] == provider["options"]["path"]
    assert (
        compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        == f"{provider['options']['path']}/{BOARD.name}"
    )
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose
    scraped = yaml.safe_load((BOARD.parents[2] / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0][
        "targets"
    ]
    assert set(scraped) == {f"{name}:8000" for name in compose if name not in ("prometheus", "grafana")}
    variable = json.loads(BOARD.read_text())["templating"]["list"][0]
    assert (variable["name"], variable["query"]) == ("datasource", source["type"])
    assert {panel["datasource"]["uid"] for panel in panels()} == {"${datasource}"}
