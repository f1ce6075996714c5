"""Settings as an operator writes them: what is empty, what is wrong, and how each program says so when it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypersam.errors import BadSettings
from hypersam.settings import PREFIX, Settings, load

PROGRAMS = {
    "serve": ("hypersam.cli", "serve", "--workers", "0"),
    "doctor": ("hypersam.cli", "doctor"),
    "worker": ("workers",),
    "alive": ("workers.alive",),
}


@pytest.fixture(autouse=True)
def no_settings_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def start(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *PROGRAMS[program]]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(PREFIX + name.upper(), "")
    assert Settings() == before


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("PORT", "tcp://10.3.2.1:80", "enableServiceLinks: false"),
        ("PORT", "many", "integer"),
        ("DEVICE", "tpu", "auto, cpu, cuda or cuda:N"),
        ("DTYPE", "float8", "'float32' or 'bfloat16'"),
        ("RATE_LIMIT", "often", "5/second"),
        ("CORS_ORIGINS", "https://example.org", "a JSON list"),
        ("CORS_ORIGINS", '"https://example.org"', "a JSON list"),
        ("CORS_ORIGINS", '["*"]', "https://example.org"),
        ("API_KEYS", "hsk_hunter2", "a JSON list"),
        ("API_KEYS", '["hsk_hunter2"]', "`hypersam keys new`"),
        ("STORE_URL", "s3://", "s3://bucket"),
        ("STORE_URL", "http://somewhere", "s3://bucket"),
        ("STORE_URL", "s3://AKIAX:hunter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("STORE_URL", "s3://AKIAX:hun/ter2@bucket/x", "AWS_ACCESS_KEY_ID"),
        ("STORE_ENDPOINT", "http://u:hunter2@host", "AWS_ACCESS_KEY_ID"),
        ("STORE_ENDPOINT", "http://u:12/hunter2@host", "AWS_ACCESS_KEY_ID"),
        ("STORE_ENDPOINT", "http://hunter2@[::1", "AWS_ACCESS_KEY_ID"),
        ("LABEL_STUDIO_URL", "http://u:hunter2@host", "HYPERSAM_LABEL_STUDIO_TOKEN"),
    ],
)
def test_what_is_wrong_is_one_line_without_the_value(
    name: str, value: str, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(BadSettings) as caught:
        load()
    said = str(caught.value)
    assert said.startswith(f"{PREFIX}{name}: ")
    assert right in said
    assert "\n" not in said
    assert "hunter2" not in said
    assert "ter2" not in said
    assert caught.value.__suppress_context__  # what pydantic raised shows no value either, but need not be seen


def test_options_are_named_as_such_and_all_that_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "DTYPE", "float8")
    with pytest.raises(BadSettings, match=r"HYPERSAM_DTYPE: .*; --log-level: "):
        load(log_level="loud")


def test_addresses_that_are_right() -> None:
    for url in ("", "s3://b", "s3://my-bucket.example/pre@fix/x", "s3://b/"):
        assert Settings(store_url=url).store_url == url
    for url in ("https://s3.example.org", "http://objectstore:9000", "http://[::1]:9000", "https://host/path/"):
        assert Settings(store_endpoint=url, label_studio_url=url).store_endpoint == url


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_end_at_once_with_a_line_and_2(program: str, tmp_path: Path) -> None:
    wrong = {"HYPERSAM_PORT": "tcp://10.3.2.1:80", "HYPERSAM_API_KEYS": "hsk_hunter2"}
    done = start(program, HYPERSAM_DATA_DIR=str(tmp_path / "data"), **wrong)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "HYPERSAM_PORT" in line
    assert "HYPERSAM_API_KEYS" in line
    assert "hunter2" not in done.stdout + done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("program", ["serve", "worker", "alive"])
def test_a_redis_url_that_is_none_ends_them_too(program: str, tmp_path: Path) -> None:
    done = start(program, HYPERSAM_DATA_DIR=str(tmp_path), HYPERSAM_REDIS_URL="http://u:hunter2@somewhere")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "redis://" in done.stderr.splitlines()[-1]
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("program", ["serve", "worker"])
def test_a_data_folder_that_cannot_be_ends_them_too(program: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = start(program, HYPERSAM_DATA_DIR=str(tmp_path / "file" / "x"), HYPERSAM_REDIS_URL="redis://127.0.0.1:1/0")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert any("HYPERSAM_DATA_DIR cannot be used: Not a directory" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "content", [None, "nonsense hsk_hunter2\n", "# nobody yet\n"], ids=["missing", "wrong", "none"]
)
def test_nothing_starts_with_a_file_of_keys_that_cannot_be_used(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    done = start("serve", HYPERSAM_DATA_DIR=str(tmp_path / "data"), HYPERSAM_API_KEYS_FILE=str(file), HYPERSAM_PORT="0")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "HYPERSAM_API_KEYS_FILE" in line
    assert "hunter2" not in line
    assert "ready" not in done.stdout
    assert not (tmp_path / "data").exists()


def test_an_object_store_that_no_client_can_be_made_for(tmp_path: Path) -> None:
    done = start("serve", HYPERSAM_DATA_DIR=str(tmp_path), HYPERSAM_STORE_URL="s3://bucket/a//b",
                 HYPERSAM_STORE_REGION="us-east-1")  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "HYPERSAM_STORE_URL" in line


def test_a_child_does_not_take_from_the_environment_what_its_parent_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERSAM_REDIS_URL", "redis://elsewhere:6379/0")
    monkeypatch.setenv("HYPERSAM_RATE_LIMIT", "1/day")
    monkeypatch.setenv("HYPERSAM_CORS_ORIGINS", '["https://example.org"]')
    ours = Settings(redis_url=None, rate_limit=None, cors_origins=())
    for name, value in ours.environment().items():
        monkeypatch.setenv(name, value)
    theirs = Settings()
    assert theirs == ours.model_copy(update={"data_dir": theirs.data_dir})
