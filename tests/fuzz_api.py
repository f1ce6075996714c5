"""Requests of every sort against the running service: ``python -m tests.fuzz_api 5000`` sends at least so many.

schemathesis makes them from the OpenAPI document, valid ones and others; no answer may be a 5xx, and each must be of a
status, media type, headers and schema that the document has. Two rounds each: from the document alone, where what it
forbids must be refused; and with a model and a picture that are there (``tests.fuzz_hooks``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from hypersam.settings import Settings
from tests.models import save_checkpoint
from tests.service.running import Api

_ROOT = Path(__file__).parents[1]
_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,missing_required_header"
)


def rounds(api: Api, model: str, cases: int, *, seed: int = 1) -> tuple[int, str]:
    """Send at least ``cases`` requests; returns how many, and schemathesis's report of the first round that failed."""
    sent = 0
    while sent < cases:
        for deep, checks in (("no", f"{_CHECKS},negative_data_rejection"), ("yes", _CHECKS)):
            made, report = _round(api, model, deep, checks, max(3, min(60, (cases - sent) // 25)), seed)
            sent += made
            if report:
                return sent, report
        seed += 1
    return sent, ""


def _round(api: Api, model: str, deep: str, checks: str, examples: int, seed: int) -> tuple[int, str]:
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json", "--no-color",
        "--continue-on-failure", "--phases=examples,coverage,fuzzing", f"--max-examples={examples}",
        f"--checks={checks}", f"--seed={seed}", "--request-timeout=30",
    ]  # fmt: skip
    hooks = {
        "SCHEMATHESIS_HOOKS": "tests.fuzz_hooks", "FUZZ_MODEL": model, "FUZZ_DEEP": deep, "PYTHONPATH": str(_ROOT),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            command, cwd=folder, env={**os.environ, **hooks}, capture_output=True, text=True, timeout=600, check=False
        )
    found = re.search(r"(\d+) generated", run.stdout)
    made = int(found[1]) if found else 0
    failed = run.returncode != 0 or made == 0
    return made, run.stdout[-20_000:] + run.stderr[-2000:] if failed else ""


def main() -> int:
    """Start a service with one small model, and send the requests."""
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data_dir=Path(folder) / "data", port=0, workers=1, worker_heartbeat=2, device="cpu", register_default=False,
            max_upload_bytes=32 << 20, max_image_bytes=1 << 20, max_image_pixels=500_000,
        )  # fmt: skip
        api = Api(settings)
        try:
            api.make_model(save_checkpoint(Path(folder) / "tiny.pth"), "tiny")
            sent, report = rounds(api, "tiny", cases)
            print(report or f"{sent} requests: no 5xx, every answer as the document says")
            return 1 if report else 0
        finally:
            api.stop()


if __name__ == "__main__":
    sys.exit(main())
