"""The Grafana board's queries, and where the labels that they name come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

BOARD = Path(__file__).parents[2] / "deploy" / "monitoring" / "grafana" / "dashboards" / "kv-cache-dtypes.json"
FROM_PROMETHEUS = {"job", "instance"}  # labels of every series, added as it is scraped

Exported = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Query:
    """``shown``: labels that the panel shows of the result."""

    panel: str
    text: str
    shown: frozenset[str]

    @property
    def parsed(self) -> Any:
        return promql.parse(self.text.replace("$__rate_interval", "1m"))


def queries(board: Path = BOARD) -> list[Query]:
    found = []
    for panel in json.loads(board.read_text())["panels"]:
        columns = {name for change in panel.get("transformations", []) for name in change["options"]["indexByName"]}
        for target in panel["targets"]:
            legend = set(re.findall(r"{{\s*(\w+)\s*}}", target.get("legendFormat", "")))
            found.append(Query(panel["title"], target["expr"], frozenset(columns | legend)))
    return found


def exported(scrape: str) -> Exported:
    """Name of each sample of a /metrics text to its labels in Prometheus."""
    samples = (sample for family in text_string_to_metric_families(scrape) for sample in family.samples)
    return {sample.name: frozenset(FROM_PROMETHEUS | set(sample.labels)) for sample in samples}


def metrics(node: Any) -> Iterator[str]:
    """Names of all metrics in a parsed query."""
    if isinstance(node, promql.VectorSelector):
        yield node.name
    elif isinstance(node, promql.MatrixSelector):
        yield from metrics(node.vector_selector)
    elif isinstance(node, promql.AggregateExpr):
        yield from metrics(node.expr)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from metrics(argument)
    elif isinstance(node, promql.BinaryExpr):
        yield from metrics(node.lhs)
        yield from metrics(node.rhs)


def labels(node: Any, known: Exported) -> frozenset[str]:
    """Labels of a parsed query's result, with ``known`` metrics. LookupError for a metric or label that is not there.

    Knows what the board uses: selectors, functions of one vector, aggregation by labels, and operators between vectors with
    the same labels or with ``on (...) group_left (...)``.
    """
    if isinstance(node, promql.MatrixSelector):
        return labels(node.vector_selector, known)
    if isinstance(node, promql.VectorSelector):
        if node.name not in known:
            raise LookupError(f"no metric {node.name}")
        return _has(known[node.name], {matcher.name for matcher in node.matchers.matchers}, node.name)
    if isinstance(node, promql.Call):
        (vector,) = (a for a in node.args if not isinstance(a, promql.NumberLiteral))
        inner = labels(vector, known)
        return _has(inner, {"le"}, "histogram_quantile") - {"le"} if node.func.name == "histogram_quantile" else inner
    if isinstance(node, promql.AggregateExpr):
        assert node.modifier is not None and node.modifier.type == promql.AggModifierType.By, node.prettify()
        by = frozenset(node.modifier.labels)
        _has(labels(node.expr, known), by, node.prettify())
        return by
    assert isinstance(node, promql.BinaryExpr), f"{type(node).__name__} is not handled"
    left, right = labels(node.lhs, known), labels(node.rhs, known)
    if node.modifier is None:
        assert left == right, node.prettify()
        return left
    join = node.modifier
    assert join.matching.type == promql.LabelModifierType.Include and join.card == promql.VectorMatchCardinality.ManyToOne
    for side in (left, right):
        _has(side, set(join.matching.labels), node.prettify())
    _has(right, set(join.group_labels), node.prettify())
    return left | set(join.group_labels)


def _has(found: frozenset[str], wanted: set[str] | frozenset[str], where: str) -> frozenset[str]:
    if missing := wanted - found:
        raise LookupError(f"no label {', '.join(sorted(missing))} in {where}")
    return found


def check(scrape: str) -> None:
    """LookupError for the first query that asks for what a server with this /metrics text does not export."""
    known = exported(scrape)
    for query in queries():
        _has(labels(query.parsed, known), query.shown, f"the result of panel {query.panel!r}: {query.text}")
