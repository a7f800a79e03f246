"""`python -m deploy.manifests`: the Prometheus rules as Kubernetes wants them, written beside the other manifests.

The operator takes rules as an object of its own kind; the rules stand once, in prometheus/rules/, and are wrapped here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parent
RULES = ("recording.yaml", "alerts.yaml")
TARGET = DEPLOY / "kubernetes/components/monitoring/prometheusrule.yaml"
HEADER = "# Made of deploy/prometheus/rules by `python -m deploy.manifests`: change them, not this.\n"


def prometheus_rule() -> str:
    """The manifest as text."""
    groups: list[dict[str, Any]] = []
    for name in RULES:
        groups += yaml.safe_load((DEPLOY / "prometheus/rules" / name).read_text(encoding="utf-8"))["groups"]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "terrace", "labels": {"app.kubernetes.io/name": "terrace"}},
        "spec": {"groups": groups},
    }
    return HEADER + yaml.safe_dump(manifest, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule(), encoding="utf-8")
