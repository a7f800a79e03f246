"""What a PromQL expression may rely on: metrics that the daemon declares, and the labels that they have.

`labels_of` walks an expression as Prometheus would and knows which labels are left; it refuses a metric, a label or a
label value that can never be there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import promql_parser as promql

from deploy.panels import family_of
from server.metrics.families import OPEN

TARGET = {"instance", "job"}
"""What Prometheus adds to every series."""
FOREIGN = {"up": TARGET, "process_start_time_seconds": TARGET}
"""Metrics of Prometheus itself, and of its client library in the daemon."""
SCALARS = {"scalar", "time", "vector"}


class Unknown(Exception):
    """The expression relies on something that does not exist."""


def labels_of(text: str, recorded: Mapping[str, set[str]]) -> set[str]:
    """The labels of the result; `recorded` are those of series that rules record. Unknown, or ValueError when it does
    not parse."""
    return _labels(promql.parse(text), recorded)


def _labels(node: Any, recorded: Mapping[str, set[str]]) -> set[str]:
    if isinstance(node, promql.VectorSelector):
        return _selected(node, recorded)
    if isinstance(node, promql.MatrixSelector):
        return _selected(node.vector_selector, recorded)
    if isinstance(node, promql.AggregateExpr):
        return _aggregated(node, recorded)
    if isinstance(node, promql.BinaryExpr):
        return _joined(node, recorded)
    if isinstance(node, promql.Call):
        return _called(node, recorded)
    if isinstance(node, promql.NumberLiteral | promql.StringLiteral):
        return set()
    return _labels(node.expr, recorded)  # in parentheses, negated, or a subquery


def _selected(node: Any, recorded: Mapping[str, set[str]]) -> set[str]:
    family = family_of(node.name)
    allowed: Mapping[str, tuple[str, ...]] = family.labels if family else {}
    if family is not None:
        has = TARGET | set(family.label_names) | ({"le"} if node.name.endswith("_bucket") else set())
        if (family.kind == "histogram") != node.name.endswith(("_bucket", "_sum", "_count")):
            raise Unknown(f"{node.name} is not how a {family.kind} is queried")
    elif node.name in recorded or node.name in FOREIGN:
        has = (recorded | FOREIGN)[node.name]
    else:
        raise Unknown(f"no metric is called {node.name}")
    for matcher in node.matchers.matchers:
        if matcher.name not in has:
            raise Unknown(f"{node.name} has no label {matcher.name}")
        values = allowed.get(matcher.name, OPEN)
        wanted = matcher.value.split("|") if values else []
        if not set(wanted) <= set(values):
            raise Unknown(f"{node.name}: {matcher.name} is never {matcher.value}")
    return set(has)


def _aggregated(node: Any, recorded: Mapping[str, set[str]]) -> set[str]:
    inner = _labels(node.expr, recorded)
    if node.modifier is None:
        return set()
    named = set(node.modifier.labels)
    if not named <= inner:
        raise Unknown(f"nothing has {sorted(named - inner)}: {node.prettify()}")
    return named if "By" in str(node.modifier.type) else inner - named


def _joined(node: Any, recorded: Mapping[str, set[str]]) -> set[str]:
    left, right = _labels(node.lhs, recorded), _labels(node.rhs, recorded)
    matching = node.modifier.matching if node.modifier else None
    if matching is None:
        scalar = any(_is_scalar(side) for side in (node.lhs, node.rhs))
        if not scalar and left != right and str(node.op) != "or":
            raise Unknown(f"{sorted(left ^ right)} are on one side only: {node.prettify()}")
    elif not set(matching.labels) <= left & right:
        raise Unknown(f"not on both sides: {sorted(matching.labels)}: {node.prettify()}")
    return right if _is_scalar(node.lhs) else left


def _is_scalar(node: Any) -> bool:
    if isinstance(node, promql.BinaryExpr):
        return _is_scalar(node.lhs) and _is_scalar(node.rhs)
    if isinstance(node, promql.ParenExpr):
        return _is_scalar(node.expr)
    return isinstance(node, promql.NumberLiteral) or (isinstance(node, promql.Call) and node.func.name in SCALARS)


def _called(node: Any, recorded: Mapping[str, set[str]]) -> set[str]:
    inner = [_labels(argument, recorded) for argument in node.args]
    name = node.func.name
    if name in SCALARS:
        return set()
    if name == "histogram_quantile":
        if "le" not in inner[1]:
            raise Unknown(f"no buckets are left: {node.prettify()}")
        return inner[1] - {"le"}
    if name == "label_replace":
        return inner[0] | {node.args[1].val}
    if name == "absent":
        return {matcher.name for matcher in node.args[0].matchers.matchers}
    return inner[0]


def shown_labels(text: str) -> set[str]:
    """The labels that a legend (`{{tier}}`) or an annotation (`$labels.tier`) shows."""
    return set(re.findall(r"(?:\{\{|\$labels\.)(\w+)", text))
