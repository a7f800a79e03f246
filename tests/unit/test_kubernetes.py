"""The manifests in deploy/kubernetes: what `kubectl kustomize` makes of them is valid, and fits the daemon."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.manifests import TARGET, prometheus_rule
from server.config import Config, load_config
from server.process import END_MARGIN_S

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OVERLAYS = ("emptydir", "ephemeral", "claim", "monitored")
VERSIONS = ("1.29", "1.32", "1.35")
"""Of Kubernetes: the manifests are valid in each."""
UNITS = {"Gi": 2**30, "Mi": 2**20}
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")


@cache
def built(overlay: str) -> list[dict[str, Any]]:
    """Every object of an overlay."""
    folder = DEPLOY / "kubernetes/overlays" / overlay
    found = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    return list(yaml.safe_load_all(found.stdout))


def one(overlay: str, kind: str, name: str = "terrace") -> dict[str, Any]:
    (found,) = (thing for thing in built(overlay) if (thing["kind"], thing["metadata"]["name"]) == (kind, name))
    return found


def pod(overlay: str) -> dict[str, Any]:
    return one(overlay, "StatefulSet")["spec"]["template"]["spec"]


def container(overlay: str) -> dict[str, Any]:
    (found,) = pod(overlay)["containers"]
    return found


def size(text: str) -> float:
    return float(text[:-2]) * UNITS[text[-2:]]


def settings(tmp_path: Path) -> Config:
    """What the daemon makes of the configuration in the manifests."""
    (config,) = (thing for thing in built("emptydir") if thing["kind"] == "ConfigMap")
    file = tmp_path / "terrace.toml"
    file.write_text(config["data"]["terrace.toml"])
    return load_config(file=file, environ={})


@needs_kubectl
@pytest.mark.skipif(find_spec("kubernetes_validate") is None, reason="pip install '.[deploy]' to validate manifests")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str, version: str) -> None:
    """Strictly by the schemas of Kubernetes: a misspelt field is an error. The operator's kinds have none there."""
    validate = __import__("kubernetes_validate").validate
    known = [thing for thing in built(overlay) if not thing["apiVersion"].startswith("monitoring.coreos.com/")]
    assert len(known) >= 5
    for thing in known:
        validate(thing, version, strict=True)


@needs_kubectl
@pytest.mark.skipif(find_spec("kubernetes_validate") is None, reason="pip install '.[deploy]' to validate manifests")
def test_the_check_finds_a_misspelt_field() -> None:
    """The net has no hole where a probe is."""
    module = __import__("kubernetes_validate")
    broken = yaml.safe_load(yaml.safe_dump(one("emptydir", "StatefulSet")))
    broken["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["failureTreshold"] = 3
    with pytest.raises(module.ValidationError):
        module.validate(broken, VERSIONS[0], strict=True)


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_what_they_are_for(overlay: str) -> None:
    """Start and readiness by /readyz, life by /livez; a start may take ten minutes, and life fails only after the
    daemon itself counts as stuck or its loop stands still for a minute."""
    spec = container(overlay)
    paths = {name: spec[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    assert spec["startupProbe"]["periodSeconds"] * spec["startupProbe"]["failureThreshold"] >= 600
    assert spec["livenessProbe"]["periodSeconds"] * spec["livenessProbe"]["failureThreshold"] >= 60
    (port,) = (port["name"] for port in spec["ports"])
    assert {spec[name]["httpGet"]["port"] for name in paths} == {port}


@needs_kubectl
def test_pods_have_the_memory_and_the_time_that_the_daemon_takes(tmp_path: Path) -> None:
    """The request holds device and DRAM tier and 2 GiB beside them, and is the limit; the grace period is longer than
    pause, drain, flush and closing."""
    config = settings(tmp_path)
    resources = container("emptydir")["resources"]
    tiers = (config.kv.device_gib + config.kv.dram_gib + 2) * 2**30
    assert size(resources["requests"]["memory"]) >= tiers
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    pause_s = float(container("emptydir")["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = config.server.shutdown_timeout_s + config.kv.drain_flush_s + END_MARGIN_S
    assert pod("emptydir")["terminationGracePeriodSeconds"] > pause_s + drain_s


@needs_kubectl
def test_the_ssd_volume_is_one_of_three_kinds_and_large_enough(tmp_path: Path) -> None:
    """emptyDir with a limit, a claim for as long as the pod lives, or one that is there; mounted where the tier is."""
    config = settings(tmp_path)
    needed = (config.kv.ssd_gib + config.kv.ssd_min_free_gib) * 2**30
    kinds: dict[str, Any] = {}
    for overlay in OVERLAYS[:3]:
        (kinds[overlay],) = ({**volume} for volume in pod(overlay)["volumes"] if volume["name"] == "ssd")
        (mount,) = (mount for mount in container(overlay)["volumeMounts"] if mount["name"] == "ssd")
        assert config.kv.ssd_path is not None
        assert config.kv.ssd_path.is_relative_to(mount["mountPath"])
    assert size(kinds["emptydir"]["emptyDir"]["sizeLimit"]) > needed
    template = kinds["ephemeral"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert size(template["resources"]["requests"]["storage"]) > needed
    assert kinds["claim"]["persistentVolumeClaim"] == {"claimName": "terrace-ssd"}


@needs_kubectl
def test_the_pod_is_the_images_user_and_may_do_nothing_else() -> None:
    """The user of the Dockerfile, a root that cannot be written, no capability, no token, a place for each write."""
    spec = pod("emptydir")
    user = spec["securityContext"]
    assert (user["runAsNonRoot"], user["runAsUser"], user["fsGroup"]) == (True, 10001, 10001)
    assert "USER 10001:10001" in (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
    inner = container("emptydir")["securityContext"]
    assert inner["readOnlyRootFilesystem"]
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert not spec["enableServiceLinks"]
    assert not spec["automountServiceAccountToken"]
    mounted = {mount["mountPath"] for mount in container("emptydir")["volumeMounts"]}
    assert {"/var/lib/terrace", "/var/cache/terrace", "/tmp"} <= mounted


@needs_kubectl
def test_selectors_select_the_pods() -> None:
    """Services, budget and set all mean the pods of the template, and the monitor one of the services."""
    labels = one("monitored", "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    chosen = [
        one("monitored", "StatefulSet")["spec"]["selector"]["matchLabels"],
        one("monitored", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("monitored", "Service")["spec"]["selector"],
        one("monitored", "Service", "terrace-pods")["spec"]["selector"],
    ]
    for selector in chosen:
        assert selector
        assert selector.items() <= labels.items()
    monitor = one("monitored", "ServiceMonitor")["spec"]
    scraped = [
        thing["metadata"]["name"]
        for thing in built("monitored")
        if thing["kind"] == "Service"
        and monitor["selector"]["matchLabels"].items() <= thing["metadata"]["labels"].items()
        and all(
            thing["metadata"]["labels"].get(rule["key"]) in rule["values"]
            for rule in monitor["selector"]["matchExpressions"]
        )
    ]
    assert scraped == ["terrace"]
    assert one("monitored", "Service")["metadata"]["labels"][monitor["jobLabel"]] == "terrace"


@needs_kubectl
def test_boards_come_along() -> None:
    """Both boards as they are committed, in a map that Grafana's sidecar looks for."""
    boards = one("monitored", "ConfigMap", "terrace-boards")
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"
    for name in ("serving.json", "tiering.json"):
        assert boards["data"][name] == (DEPLOY / "grafana" / name).read_text(encoding="utf-8")


def test_rules_are_those_of_prometheus() -> None:
    """The operator's object holds what stands in prometheus/rules; `python -m deploy.manifests` makes it anew."""
    assert TARGET.read_text(encoding="utf-8") == prometheus_rule()
    groups = [group["name"] for group in yaml.safe_load(prometheus_rule())["spec"]["groups"]]
    assert len(groups) == len(set(groups)) > 3


def test_the_configuration_in_the_manifests_is_one_that_the_daemon_takes() -> None:
    """No unknown key, and nothing that does not fit together."""
    file = DEPLOY / "kubernetes/base/terrace.toml"
    assert load_config(file=file, environ={}).kv.ssd_gib
    assert tomllib.loads(file.read_text(encoding="utf-8"))["kv"]["dram_gib"]
