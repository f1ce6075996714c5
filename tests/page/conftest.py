from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from pycocotools import mask as coco

from hypersam.settings import Settings
from tests.service.running import ROOT, Api

ASSETS = ROOT / "hypersam" / "assets"
CARRIED = ASSETS / "small_sam.pth"
ON = (230, 46)  # a pixel of the first sample's largest thing, by its annotation
UNTOUCHED = '{"min_elements": 1099511627776}'
expect.set_options(timeout=20_000)  # milliseconds, for machines that have more to do
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium on this machine (Debian: apt-get install chromium)"


# Not for the whole session: Playwright keeps an event loop running, beside which other tests cannot run theirs.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """With the carried SAM as it is (``original``) and eight times smaller (``eight``)."""
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), port=0, workers=1, worker_heartbeat=2, device="cpu",
        register_default=False,
    )  # fmt: skip
    service = Api(settings)
    try:
        # By an equal error, which needs no measuring; pictures show what users get.
        policy = "sensitivity" if os.environ.get("HYPERSAM_SCREENSHOTS") else "equal_error"
        eight = {"codec": "lattice", "preset": "8x", "policy": policy, "fidelity": "true"}
        for name, options in {"original": {"options": UNTOUCHED}, "eight": eight}.items():
            sent = service.compress(CARRIED, name=name, **options)
            assert service.wait_job(sent.json()["id"])["state"] == "succeeded", service.output()
        yield service
    finally:
        service.stop()


class Visit:
    """A fresh visitor of the page, who notes what it says on the console and whom it asks."""

    def __init__(self, browser: Browser, url: str, *, errors: bool = False, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(locale="en-GB", **{"viewport": {"width": 1280, "height": 900}} | options)
        self.context.set_default_timeout(20_000)
        self.page: Page = self.context.new_page()
        self.noise: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda m: self._said(m.type, m.text, errors))
        self.page.on("pageerror", lambda error: self.noise.append(str(error)))
        self.page.on("request", lambda r: None if r.url.startswith((url, "blob:")) else self.elsewhere.append(r.url))
        self.page.goto(url + "/")

    def _said(self, kind: str, text: str, errors: bool) -> None:
        # Chromium itself notes every status from 400 on.
        if kind in ("warning", "error") and not (errors and text.startswith("Failed to load resource")):
            self.noise.append(f"{kind}: {text}")

    def sample(self, number: int = 0) -> None:
        with self.page.expect_response("**/embed") as answer:
            self.page.click(f"[aria-label='Sample picture {number + 1}']")
        assert answer.value.status == 200
        self.page.locator("#panel-a .busy").wait_for(state="hidden")

    def place(self, x: float, y: float, panel: str = "a") -> tuple[float, float]:
        """Of a pixel of the 256 × 256 sample, on the window."""
        canvas = self.page.locator(f"#stage-{panel}")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        return box["x"] + x / 256 * box["width"], box["y"] + y / 256 * box["height"]

    def segmented(self, act: Callable[[], object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Do something that asks for one mask; what was asked and what was answered."""
        with self.page.expect_response("**/segment") as answer:
            act()
        response = answer.value
        assert response.status == 200, response.text()
        until(self.page, "document.querySelector('#panel-a .figures').textContent !== ''")
        return response.request.post_data_json, response.json()

    def click(self, x: float, y: float, button: Any = "left") -> tuple[dict[str, Any], dict[str, Any]]:
        return self.segmented(lambda: self.page.mouse.click(*self.place(x, y), button=button))

    def canvas(self, panel: str = "a") -> np.ndarray:
        """What the canvas shows, as RGB."""
        self.page.wait_for_timeout(100)  # the next frame is drawn
        found = self.page.eval_on_selector(f"#stage-{panel}", "c => c.toDataURL('image/png')")
        return pixels(base64.b64decode(found.partition(",")[2]))[..., :3].astype(np.int16)

    def shows(self, selector: str, text: str) -> None:
        """Wait for an element to show a text: the page fills its parts when their answers come, not all at once."""
        expect(self.page.locator(selector)).to_contain_text(text)

    def becomes(self, found: Callable[[], object]) -> None:
        """Wait for what is found of the page to become true."""
        deadline = time.monotonic() + 20
        while not found():
            assert time.monotonic() < deadline, "not within 20 s"
            self.page.wait_for_timeout(20)

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visit(browser: Browser, service: Api) -> Iterator[Callable[..., Visit]]:
    """Open the page; at the end it must have asked no other host and complained of nothing."""
    opened: list[Visit] = []

    def open_page(**options: Any) -> Visit:
        opened.append(Visit(browser, options.pop("url", service.url), **options))
        return opened[-1]

    with contextlib.ExitStack() as stack:
        for_all = opened
        stack.callback(lambda: [each.close() for each in for_all])
        yield open_page
        for each in opened:
            assert each.noise == []
            assert each.elsewhere == []


def refuse(status: int, code: str, **headers: str) -> Callable[[Route], None]:
    body = json.dumps({"code": code, "detail": "as tested"})
    return lambda route: route.fulfill(
        status=status, headers=headers, content_type="application/problem+json", body=body
    )


def until(page: Page, expression: str, timeout: float = 20_000) -> None:
    """Wait for an expression to become true, asked from outside: the page's policy lets nothing within it use eval."""
    deadline = time.monotonic() + timeout / 1e3
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"not within {timeout} ms: {expression}"
        page.wait_for_timeout(20)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


def decoded(mask: dict[str, Any]) -> np.ndarray:
    """An answer's mask, of COCO's RLE."""
    return coco.decode(mask["segmentation"]).astype(bool)


def resized(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = (np.arange(n) * of // n for n, of in zip(shape, mask.shape, strict=True))
    return mask[rows][:, columns]


def checkpoint_of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
