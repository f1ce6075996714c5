"""Told to stop in the middle of its work the service ends what it took in, and says so in its log."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from hypersam.settings import Settings
from tests.models import ModelSize, save_checkpoint
from tests.service.running import Api, picture

pytestmark = pytest.mark.slow

SLOW = ModelSize(image=256, patch=8, dim=96, depth=4, heads=2, window=8, global_blocks=(1, 3), prompt_dim=32)


def test_what_was_taken_in_is_answered(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path / "data", port=0, workers=1, device="cpu", register_default=False, log_format="json",
        max_waiting=6,
    )  # fmt: skip
    service = Api(settings)
    try:
        service.make_model(save_checkpoint(tmp_path / "slow.pth", SLOW), "slow")
        answers: list[httpx.Response] = []

        def ask(number: int) -> None:
            form = {"model": "slow", "points": "[[9, 9]]"}
            with httpx.Client(base_url=service.url, timeout=60) as client:
                answers.append(
                    client.post("/segment", files={"image": picture(300, 300, seed=number)}, data=form,
                                headers={"X-Request-ID": f"asked-{number}"})
                )  # fmt: skip

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(9)]
        for thread in threads:
            thread.start()
        while len([a for a in answers if a.status_code == 503]) < 3:  # the house is full
            time.sleep(0.005)
            assert any(thread.is_alive() for thread in threads), [a.status_code for a in answers]
        assert service.stop(signal.SIGTERM, timeout=60) == 0, service.output()
        for thread in threads:
            thread.join()
    finally:
        service.stop(signal.SIGKILL)
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [503] * 3
    for refused in (answer for answer in answers if answer.status_code == 503):
        assert refused.json()["code"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    lines = [json.loads(line) for line in service.output().splitlines() if line.startswith("{")]
    told = {line["request_id"]: line for line in lines if line["logger"] == "hypersam.requests"}
    assert {f"asked-{n}" for n in range(9)} <= set(told)
    assert sorted(told[f"asked-{n}"]["status"] for n in range(9)) == [200] * 6 + [503] * 3
    assert "Traceback" not in service.output()
