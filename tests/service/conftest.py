from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hypersam.embedded_redis import EmbeddedRedis
from hypersam.settings import Settings
from tests.models import save_checkpoint
from tests.service.running import Api


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny.pth")


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "other.pth", seed=1)


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The whole service with one worker and small limits."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), port=0, workers=1, worker_heartbeat=2, device="cpu",
        max_upload_bytes=32 << 20, max_image_bytes=1 << 20, max_image_pixels=500_000, register_default=False,
        keep_uploads=True,
    )  # fmt: skip
    service = Api(settings)
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="session")
def model(api: Api, checkpoint: Path) -> str:
    """A model that is ready to be used."""
    api.make_model(checkpoint, "tiny")
    return "tiny"


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "data") as server:
        yield server
