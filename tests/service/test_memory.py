from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hypersam.settings import Settings
from tests.service.running import Api

pytestmark = pytest.mark.slow

MIB = 1 << 20
SIZE = 2600 * MIB if os.environ.get("HYPERSAM_TEST_FULL_UPLOAD") else 600 * MIB


def test_a_large_upload_does_not_grow_the_process(tmp_path: Path) -> None:
    """600 MB, or 2.6 GB with HYPERSAM_TEST_FULL_UPLOAD=1. The file is a legacy pickle by its first bytes only."""
    if shutil.disk_usage(tmp_path).free < 2 * SIZE:
        pytest.skip("not enough room on the disk")
    settings = Settings(data_dir=tmp_path / "data", port=0, workers=0, device="cpu", register_default=False)
    service = Api(settings)
    try:
        process = psutil.Process(service.process.pid)
        before = process.memory_info().rss
        peak = before
        digest = hashlib.sha256()
        block = b"\x80" + os.urandom(MIB - 1)

        def body() -> Iterator[bytes]:
            nonlocal peak
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="large.pth"\r\n\r\n'
            for number in range(SIZE // MIB):
                digest.update(block)
                yield block
                if number % 16 == 0:
                    peak = max(peak, process.memory_info().rss)
            yield b"\r\n--b--\r\n"

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        response = service.http.post("/compress", content=body(), headers=headers, timeout=600)
        assert response.status_code == 202, response.text
        assert response.json()["source_sha256"] == digest.hexdigest()
        peak = max(peak, process.memory_info().rss)
        assert peak - before < 100 * MIB, f"grew by {(peak - before) / MIB:.0f} MiB"
        stored = settings.data_dir / "uploads" / digest.hexdigest()
        assert stored.stat().st_size == SIZE
        assert len(list((settings.data_dir / "uploads").iterdir())) == 1  # written once
    finally:
        service.stop()
        shutil.rmtree(settings.data_dir)
