"""What the image runs, taken from the Dockerfile and run: the list of its dependencies, and its health check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

from tests.service.running import ROOT, Api

TEXT = re.sub(r"\\\n\s*", "", (ROOT / "docker/Dockerfile").read_text())


def test_the_first_layer_installs_what_the_package_depends_on() -> None:
    found = re.search(r'^RUN python -c "(.+?)"\s+> /tmp/requirements.txt', TEXT, re.MULTILINE)
    assert found is not None
    done = subprocess.run([sys.executable, "-c", found[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [line for line in done.stdout.splitlines() if line] == wanted


def test_the_health_check_tells_a_service_that_answers_from_one_that_does_not(api: Api) -> None:
    found = re.search(r"^HEALTHCHECK .*?CMD (\[.*\])$", TEXT, re.MULTILINE)
    assert found is not None
    [python, *rest] = json.loads(found[1])
    assert python == "python"

    def check(port: str) -> int:
        environment = {**os.environ, "HYPERSAM_PORT": port}
        return subprocess.run([sys.executable, *rest], env=environment, capture_output=True, timeout=30).returncode

    assert check(api.url.rpartition(":")[2]) == 0
    assert check("1") != 0


def test_the_default_command_is_one_of_ours() -> None:
    found = re.search(r"^CMD (\[.*\])$", TEXT, re.MULTILINE)
    assert found is not None
    command = json.loads(found[1])
    assert command[0] == "hypersam"
    done = subprocess.run(
        [sys.executable, "-m", "hypersam.cli", *command[1:], "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
