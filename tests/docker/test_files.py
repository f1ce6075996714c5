"""The compose files, the Kubernetes manifest and the units agree with the image and with the settings."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from hypersam.keys import new_key
from hypersam.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = ("api", "worker")
MANIFEST: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "docker/kubernetes/hypersam.yaml").read_text()))
# Passed on where they are set, without a default; AWS_…, which the object store's client reads, are besides.
PASSED = {f"HYPERSAM_STORE_{name}" for name in ("URL", "ENDPOINT", "REGION", "ALLOW_HTTP")}
PASSED |= {"HYPERSAM_RATE_LIMIT", "HYPERSAM_CORS_ORIGINS"}
PASSED |= {f"HYPERSAM_LABEL_STUDIO_{name}" for name in ("URL", "TOKEN", "STORES")}


class ComposeLoader(yaml.SafeLoader):
    """Takes Compose's own tag for what an override takes away, as something empty."""


ComposeLoader.add_constructor("!reset", lambda loader, node: {})


def known(names: set[str]) -> set[str]:
    """Those that no setting has."""
    fields = {PREFIX + name.upper() for name in Settings.model_fields}
    return {name for name in names if name.startswith(PREFIX)} - fields


def dockerfile(word: str) -> list[str]:
    """The arguments of every instruction of that name, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "docker/Dockerfile").read_text())
    return [line.split(None, 1)[1] for line in text.splitlines() if line.startswith(word + " ")]


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker/compose.cpu.yml"])
def test_the_compose_files_are_as_the_compose_specification_has_them(name: str) -> None:
    schemas = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    validator = jsonschema_rs.validator_for(json.loads((schemas / "compose-spec.json").read_text()))
    written = yaml.load((ROOT / name).read_text(), ComposeLoader)
    assert [f"{e.instance_path}: {e.message}" for e in validator.iter_errors(written)] == []
    written["services"]["api"]["no_such_key"] = 1
    assert not validator.is_valid(written)


def compose(*arguments: str, example: str = "") -> dict[str, Any]:
    """What Compose itself makes of the files, with a ``.env`` as given; skips where there is no Compose 2."""
    for program in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(program[0]) and subprocess.run([*program, "version"], capture_output=True).stdout.startswith(
            b"Docker Compose"
        ):
            break
    else:
        pytest.skip("there is no 'docker compose' here")
    with tempfile.NamedTemporaryFile("w", suffix=".env") as file:
        file.write(example)
        file.flush()
        command = [*program, "--env-file", file.name, *arguments, "config", "--format", "json"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith((PREFIX, "AWS_", "COMPOSE_"))}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


CPU = ("-f", "docker-compose.yml", "-f", "docker/compose.cpu.yml")


def test_compose_itself_reads_the_files() -> None:
    gpu, cpu = compose(), compose(*CPU)
    assert set(gpu["services"]) == set(cpu["services"]) == {"redis", *OURS}
    assert set(compose("--profile", "metrics")["services"]) == {"redis", *OURS, "prometheus", "grafana"}
    assert set(compose("--profile", "objectstore")["services"]) == {"redis", *OURS, "objectstore"}
    for name in OURS:
        before, after = gpu["services"][name], cpu["services"][name]
        [device] = before["deploy"]["resources"].pop("reservations")["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
        assert (before["environment"].pop("HYPERSAM_DEVICE"), after["environment"].pop("HYPERSAM_DEVICE")) == (
            "auto",
            "cpu",
        )
        assert before == after  # the override takes the GPU away and nothing else
        assert before["depends_on"]["redis"]["condition"] == "service_healthy"
    # Neither a name nor a port of the host stands in the way of several workers.
    assert not {"container_name", "ports"} & set(gpu["services"]["worker"])


@pytest.mark.parametrize("files", [(), CPU], ids=["gpu", "cpu"])
def test_what_is_in_the_env_file_reaches_the_containers(
    files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = new_key("shop", ["segment", "admin"])
    chosen = {
        "HYPERSAM_API_KEYS": json.dumps([key.line()]),
        "HYPERSAM_RATE_LIMIT": "7/second",
        "HYPERSAM_CORS_ORIGINS": '["https://example.org"]',
        "HYPERSAM_LABEL_STUDIO_URL": "https://labels.example",
        "HYPERSAM_LABEL_STUDIO_TOKEN": "change-this-token",
        "HYPERSAM_LABEL_STUDIO_STORES": '["https://bucket.s3.amazonaws.com"]',
        "HYPERSAM_STORE_URL": "s3://bucket/prefix",
        "HYPERSAM_STORE_ENDPOINT": "http://objectstore:9000",
        "HYPERSAM_STORE_REGION": "us-east-1",
        "HYPERSAM_STORE_ALLOW_HTTP": "true",
        "HYPERSAM_RESIDENT_BYTES": "123456789",
        "AWS_ACCESS_KEY_ID": "hypersam",
        "AWS_SECRET_ACCESS_KEY": "change-this-secret",
    }
    made = compose(*files, example="".join(f"{name}={value}\n" for name, value in chosen.items()))
    for name in OURS:
        environment = made["services"][name]["environment"]
        assert environment.items() >= chosen.items()
        with monkeypatch.context() as patched:
            for variable, value in environment.items():
                patched.setenv(variable, value)
            settings = Settings()
        assert settings.api_keys == (key.line(),)
        assert settings.resident_bytes == 123456789
        assert settings.device == ("cpu" if files else "auto")


def test_what_compose_sets_are_settings() -> None:
    for name in OURS:
        environment = COMPOSE["services"][name]["environment"]
        assert not known(set(environment))
        given = {key[len(PREFIX) :].lower(): re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", str(value))
                 for key, value in environment.items() if key.startswith(PREFIX) and key not in PASSED}  # fmt: skip
        given["api_keys"] = tuple(yaml.safe_load(given["api_keys"]))
        defaults = Settings()
        made = Settings(**given)
        for key in ("device", "dtype", "log_level", "max_upload_bytes", "resident_bytes", "api_keys"):
            assert getattr(made, key) == getattr(defaults, key), key


def test_every_variable_of_the_compose_file_is_in_the_example_and_with_the_same_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    lines = re.findall(r"^#?([A-Z_0-9]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert {key: value for key, value in lines if not key.startswith("AWS_") and key not in PASSED} == {
        key: value for key, value in used.items() if not key.startswith("AWS_")
    }
    assert {key for key, _ in lines} >= PASSED
    for name in OURS:
        environment = COMPOSE["services"][name]["environment"]
        assert {key for key in PASSED if key in environment and environment[key] is None} == PASSED


def test_our_containers_are_confined_and_share_what_they_must() -> None:
    for name in OURS:
        service = COMPOSE["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["restart"] == "unless-stopped"
        assert service["deploy"]["resources"]["limits"]["memory"]
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        targets = {volume.split(":")[1] for volume in service["volumes"]}
        assert targets == {"/data", "/home/hypersam/.cache"}
    variables = dict(pair.split("=", 1) for line in dockerfile("ENV") for pair in line.split())
    for cache in ("TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"):
        assert variables[cache].startswith("/home/hypersam/.cache/")
    assert dockerfile("USER") == ["10001:10001"]
    assert {"--appendonly", "noeviction"} <= set(COMPOSE["services"]["redis"]["command"])
    assert all(volume.split(":")[0] in COMPOSE["volumes"] or volume.startswith("./")
               for service in COMPOSE["services"].values() for volume in service["volumes"])  # fmt: skip


def test_what_is_copied_is_in_the_build_context() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in dockerfile("COPY") for source in line.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for document in MANIFEST:
        if document["kind"] in ("Deployment", "StatefulSet"):
            template = document["spec"]["template"]
            assert document["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
            yield document["metadata"]["name"], document, template


def test_the_manifest_is_whole() -> None:
    by_kind = {(document["kind"], document["metadata"]["name"]) for document in MANIFEST}
    assert len(by_kind) == len(MANIFEST)
    [settings] = [document["data"] for document in MANIFEST if document["kind"] == "ConfigMap"]
    assert not known(set(settings))
    assert all(isinstance(value, str) for value in settings.values())
    labels = [template["metadata"]["labels"] for _, _, template in pods()]
    for document in MANIFEST:
        if document["kind"] == "Service":
            wanted = document["spec"]["selector"].items()
            assert any(wanted <= found.items() for found in labels), document["metadata"]["name"]
    host = re.fullmatch(r"redis://([a-z-]+):6379/0", settings["HYPERSAM_REDIS_URL"])
    assert host is not None
    assert ("Service", host[1]) in by_kind


def test_the_manifest_s_pods() -> None:
    for name, document, template in pods():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
        [container] = spec["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["resources"]["limits"]["memory"]
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["port"] in ports
        if name != "hypersam-redis":
            same = COMPOSE["services"][name.removeprefix("hypersam-")]
            assert container["args"] == same["command"]
            assert spec["securityContext"]["runAsUser"] == 10001
            assert container["securityContext"]["readOnlyRootFilesystem"]
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted == {"/data", "/home/hypersam/.cache", "/tmp"}


@pytest.mark.parametrize("unit", ["hypersam-api.service", "hypersam-worker@.service"])
def test_units_set_what_exists(unit: str) -> None:
    text = (ROOT / "docker/systemd" / unit).read_text()
    assert not known(set(re.findall(r"\b(HYPERSAM_[A-Z_]+)=", text)))
    for line in (line for line in text.splitlines() if line and not line.startswith(("#", "["))):
        assert "=" in line
    assert "KillMode=mixed" in text
