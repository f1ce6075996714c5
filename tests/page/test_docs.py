"""The interface's page at /docs in a real browser: whole without another host, and its forms ask the service."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from hypersam.keys import new_key
from hypersam.settings import Settings
from tests.page.conftest import CARRIED, Visit
from tests.service.running import Api

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def bare(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service without models."""
    service = Api(_settings(tmp_path_factory.mktemp("data")))
    try:
        yield service
    finally:
        service.stop()


def _settings(folder: Path, **more: Any) -> Settings:
    return Settings(data_dir=folder, port=0, workers=0, device="cpu", register_default=False, **more)


@contextmanager
def described(browser: Browser, service: Api, at: str = "", **options: Any) -> Iterator[Page]:
    """The page, which must have asked no other host and complained of nothing."""
    v = Visit(browser, service.url, errors=True, **options)  # Chromium notes statuses from 400 on
    try:
        v.page.goto(f"{service.url}/docs{at}")
        expect(v.page.locator(".operation").first).to_be_visible()
        yield v.page
        assert v.noise == []
        assert v.elsewhere == []
    finally:
        v.close()


def opened(page: Page, name: str) -> Any:
    """An operation with its form."""
    card = page.locator(f"#{name}")
    if card.get_attribute("open") is None:
        card.locator("summary").first.click()
    card.get_by_text("Try it").click()
    return card


def test_the_files_are_the_services_own(bare: Api) -> None:
    page = bare.http.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy == bare.http.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "://" not in page.text
    for gone in ("/redoc", "/docs/oauth2-redirect"):
        assert bare.http.get(gone).status_code == 404


def test_every_operation_is_shown(browser: Browser, bare: Api) -> None:
    document = bare.http.get("/openapi.json").json()
    with described(browser, bare) as page:
        shown = [
            tuple(card.locator("summary").first.locator(".method, .path").all_inner_texts())
            for card in page.locator(".operation").all()
        ]
        wanted = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
        assert len(shown) == len(wanted)
        assert set(shown) == wanted
        # What opens may hold more that can be opened.
        while page.evaluate("[...document.querySelectorAll('details:not([open])')].map(e => (e.open = true)).length"):
            page.wait_for_timeout(50)
        segment = page.locator("#post-segment")
        body = document["paths"]["/segment"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for name in body["properties"]:
            assert segment.locator("dt", has_text=name).first.is_visible(), name
        expect(segment).to_contain_text("application/x-www-form-urlencoded")
        expect(segment).to_contain_text("the same as point_labels")
        expect(page.locator("#get-jobs-job-id-events")).to_contain_text("text/event-stream")
        assert "undefined" not in page.inner_text("body")
        assert "[object" not in page.inner_text("body")


def test_an_operation_has_an_address_of_its_own(browser: Browser, bare: Api) -> None:
    with described(browser, bare, "#get-variants", viewport={"width": 360, "height": 740}) as page:
        expect(page.locator("#get-variants h3").first).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_operations_can_be_tried(browser: Browser, bare: Api) -> None:
    with described(browser, bare) as page:
        ready = opened(page, "get-readyz")
        ready.locator("form input").fill("compress")
        with page.expect_response("**/readyz?need=compress") as answer:
            ready.get_by_role("button", name="Send").click()
        expect(ready.locator("pre")).to_contain_text('"workers": 0')
        assert answer.value.status == 200
        embed = opened(page, "post-embed")
        embed.locator("form input[type=text]").fill("none")
        embed.locator("form input[type=file]").set_input_files(CARRIED)
        embed.get_by_role("button", name="Send").click()
        expect(embed.locator("pre")).to_contain_text("unknown_model")
        segment = opened(page, "post-segment")
        segment.get_by_label("Content-Type").select_option("application/x-www-form-urlencoded")
        segment.get_by_label("Accept").select_option("application/geo+json")
        segment.get_by_label("image_id").fill("none & nothing")
        with page.expect_request("**/segment") as asked:
            segment.get_by_role("button", name="Send").click()
        assert asked.value.headers["accept"] == "application/geo+json"
        assert asked.value.post_data == "image_id=none+%26+nothing"
        expect(segment.locator("pre")).to_contain_text("'model' is missing")
        predict = opened(page, "post-predict")
        predict.locator("textarea").fill('{"tasks": 1}')
        predict.get_by_role("button", name="Send").click()
        expect(predict.locator("pre")).to_contain_text("tasks")
        expect(predict.locator("form strong")).to_have_text("422")


def test_with_keys(browser: Browser, tmp_path: Path) -> None:
    secret, key = new_key("docs", ["segment"])
    guarded = Api(_settings(tmp_path, api_keys=(key.line(),)))
    try:
        with described(browser, guarded) as page:
            models = opened(page, "get-models")
            models.get_by_role("button", name="Send").click()
            expect(models.locator("form strong")).to_have_text("401")
            page.get_by_text("API key").first.click()
            page.fill("#key", secret)
            page.keyboard.press("Enter")
            models.get_by_role("button", name="Send").click()
            expect(models.locator("form strong")).to_have_text("200")
            expect(models.locator("pre")).to_contain_text('"models": []')
    finally:
        guarded.stop()
