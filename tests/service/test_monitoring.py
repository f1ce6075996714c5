"""What Grafana asks and Prometheus watches exists in what a running service exposes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.service.running import ROOT, Api, picture

_NAME = re.compile(r"\bhypersam_[a-z_]+")
_BY = re.compile(r"\bby \(([^)]*)\)")
_MATCHER = re.compile(r"\{([^}]*)\}")
_LABEL = re.compile(r'([a-z_]+)(?:=|!=|=~|!~)"')


def dashboard() -> list[str]:
    board = json.loads((ROOT / "docker/grafana/dashboards/hypersam.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def alerts() -> list[str]:
    groups = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def exposed(api: Api, model: str) -> dict[str, set[str]]:
    """The labels of every sample, by its name, once everything has happened at least once."""
    for _ in range(2):
        assert api.http.post(
            "/segment", files={"image": picture()}, data={"model": model, "points": "[[1, 1]]"}
        ).is_success
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(api.http.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", [*dashboard(), *alerts()])
def test_a_query_is_about_what_is_exposed(expression: str, exposed: dict[str, set[str]]) -> None:
    names = set(_NAME.findall(expression))
    assert names or expression.startswith("up{")
    assert names <= set(exposed), names - set(exposed)
    labels = {label for name in names for label in exposed[name]} | {"job", "instance"}
    asked = {label.strip() for group in _BY.findall(expression) for label in group.split(",")}
    asked |= {label for group in _MATCHER.findall(expression) for label in _LABEL.findall(group)}
    assert asked <= labels, asked - labels


def test_every_metric_is_documented_and_drawn(exposed: dict[str, set[str]]) -> None:
    # Every counter and histogram has besides the time when it was made.
    names = {name for name in exposed if name.startswith("hypersam_") and not name.endswith("_created")}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    text = (ROOT / "docs/deploy.md").read_text()
    assert not {name for name in ours if f"`{name}`" not in text}
    drawn = {re.sub(r"_(bucket|sum|count)$", "", name) for query in dashboard() for name in _NAME.findall(query)}
    assert ours == drawn


def test_prometheus_asks_the_port_that_the_compose_file_serves() -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    [target] = config["scrape_configs"][0]["dns_sd_configs"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    [name] = target["names"]
    assert str(target["port"]) in services[name]["command"]
    assert all((ROOT / "docker/prometheus" / file).is_file() for file in config["rule_files"])
    provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/hypersam.yml").read_text())
    source = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text())
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert provider["providers"][0]["options"]["path"] == mounts["./docker/grafana/dashboards"]
    board = json.loads(Path(ROOT / "docker/grafana/dashboards/hypersam.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["datasources"][0]["uid"]}
