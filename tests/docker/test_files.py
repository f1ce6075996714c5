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
# What a container has of its own, whatever .env says, and what it has of the image and the command.
FIXED = {"redis_url": "redis://redis:6379/0", "data_dir": "/data", "workers": "0"}
INSIDE = {"host", "port"}
# Read by the object store's client.
OTHERS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}


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
            None,
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
        settings = settings_of(environment, monkeypatch)
        assert settings.api_keys == (key.line(),)
        assert settings.resident_bytes == 123456789
        assert settings.device == ("cpu" if files else "auto")


def settings_of(environment: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a program in such a container is set up with; a variable without a value is not there."""
    with monkeypatch.context() as patched:
        for variable in [*(PREFIX + name.upper() for name in Settings.model_fields), *OTHERS]:
            patched.delenv(variable, raising=False)
        for variable, value in environment.items():
            if value is not None:
                patched.setenv(variable, value)
        return Settings()


@pytest.mark.parametrize("files", [(), CPU], ids=["gpu", "cpu"])
def test_every_setting_in_the_env_file_reaches_the_containers(files: tuple[str, ...]) -> None:
    """But for what they have of their own. A setting that is new and was forgotten in the compose file fails here."""
    fixed = FIXED | ({"device": "cpu"} if files else {})
    chosen = {PREFIX + field.upper(): f"chosen-{field}" for field in Settings.model_fields}
    chosen |= {name: f"chosen-{name}" for name in OTHERS}
    made = compose(*files, example="".join(f"{name}={value}\n" for name, value in chosen.items()))
    wanted = {name: value for name, value in chosen.items() if name[len(PREFIX) :].lower() not in INSIDE}
    wanted |= {PREFIX + field.upper(): value for field, value in fixed.items()}
    for name in OURS:
        assert made["services"][name]["environment"] == wanted


def test_without_an_env_file_all_is_as_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        made = settings_of(compose()["services"][name]["environment"], monkeypatch)
        assert made == settings_of({}, monkeypatch).model_copy(
            update={"redis_url": FIXED["redis_url"], "data_dir": Path("/data"), "workers": 0, "log_format": "json"}
        )


def test_what_compose_sets_are_settings() -> None:
    for name in OURS:
        assert not known(set(COMPOSE["services"][name]["environment"]))


def test_the_example_has_what_compose_asks_for_and_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / ".env.example").read_text()
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text()))
    lines = dict(re.findall(r"^([A-Z_0-9]+)=(.*)$", text, re.MULTILINE))
    proposed = dict(re.findall(r"^#([A-Z_0-9]+)=(.*)$", text, re.MULTILINE))
    passed = {key for key, value in COMPOSE["services"]["api"]["environment"].items() if value is None}
    assert set(lines | proposed) <= set(used) | passed
    assert set(used) <= set(lines | proposed)
    assert {key: lines[key] for key in used if key in lines} == {key: used[key] for key in used if key in lines}
    settings = {key: value for key, value in lines.items() if key in passed}
    assert settings
    assert settings_of(dict(settings), monkeypatch) == settings_of({}, monkeypatch)
    # Those that are commented out are right, too.
    offered = {key: value for key, value in proposed.items() if key.startswith(PREFIX)}
    assert settings_of(dict(offered), monkeypatch) != settings_of({}, monkeypatch)


def test_the_example_s_object_store_is_the_one_of_the_profile() -> None:
    proposed = dict(re.findall(r"^#([A-Z_0-9]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    service = COMPOSE["services"]["objectstore"]
    made = re.search(r"mkdir -p /data/(\S+) ", " ".join(service["entrypoint"]))
    assert made is not None
    assert proposed["HYPERSAM_STORE_URL"] == f"s3://{made[1]}"
    assert proposed["HYPERSAM_STORE_ENDPOINT"] == "http://objectstore:9000"
    assert proposed["HYPERSAM_STORE_ALLOW_HTTP"] == "true"
    for ours, theirs in (("AWS_ACCESS_KEY_ID", "MINIO_ROOT_USER"), ("AWS_SECRET_ACCESS_KEY", "MINIO_ROOT_PASSWORD")):
        assert service["environment"][theirs] == f"${{{ours}:-{proposed[ours]}}}"


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
        # A Service of our name would set HYPERSAM_PORT, to something that is no port.
        assert spec["enableServiceLinks"] is False
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


def test_nginx_itself_reads_the_proxy_of_the_docs(tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None or shutil.which("openssl") is None:
        pytest.skip("there is no nginx and openssl here")
    [block] = re.findall(
        r"^```\n(limit_conn_zone .*?)^```", (ROOT / "docs/deploy.md").read_text(), re.MULTILINE | re.DOTALL
    )
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=sam.example.org"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    block = block.replace("/etc/ssl/sam.example.org.pem", str(certificate)).replace(
        "/etc/ssl/sam.example.org.key", str(key)
    )
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{block}}}\n")
    command = [nginx, "-t", "-p", str(tmp_path), "-e", str(tmp_path / "log"), "-c", "nginx.conf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Settings().max_upload_bytes < int(re.findall(r"client_max_body_size (\d+)m;", block)[0]) << 20


@pytest.mark.parametrize("unit", ["hypersam-api.service", "hypersam-worker@.service"])
def test_units_set_what_exists(unit: str) -> None:
    text = (ROOT / "docker/systemd" / unit).read_text()
    assert not known(set(re.findall(r"\b(HYPERSAM_[A-Z_]+)=", text)))
    for line in (line for line in text.splitlines() if line and not line.startswith(("#", "["))):
        assert "=" in line
    assert "KillMode=mixed" in text
