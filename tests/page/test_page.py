"""The page in a real browser, at a real service."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Route, expect
from pycocotools import mask as coco

from hypersam.keys import new_key
from hypersam.settings import Settings
from tests.page.conftest import ON, ROOT, Visit, checkpoint_of, decoded, pixels, refuse, resized, until
from tests.service.running import Api

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # pycocotools' decoder, with NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
Open = Callable[..., Visit]
SHOTS = ROOT / "docs" / "images"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


def digits(text: str, like: np.ndarray) -> np.ndarray:
    return (np.frombuffer(text.encode(), np.uint8) == ord("1")).reshape(like.shape)


def test_files_types_and_caching(service: Api) -> None:
    page = service.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-cache"
    assert service.http.head("/").status_code == 200
    for path, kind in (("page.js", "text/javascript"), ("page.css", "text/css"), ("icon.svg", "image/svg+xml")):
        file = service.http.get(f"/static/{path}")
        assert file.headers["content-type"].startswith(kind)
        again = service.http.get(f"/static/{path}", headers={"If-None-Match": file.headers["etag"]})
        assert again.status_code == 304
    assert service.http.get("/static/../app.py").status_code == 404
    assert service.http.get("/static/%2e%2e/app.py").status_code == 404


def test_masks_are_decoded_as_coco_encodes_them(visit: Open) -> None:
    rng = np.random.default_rng(5)
    shapes = [(7, 5), (1, 40), (64, 48), (300, 200)]
    masks = [rng.random(shape) < share for shape in shapes for share in (0, 0.02, 0.5, 1)]
    blob = np.zeros((900, 1200), bool)
    blob[100:800, 50:1190] = True  # runs of more than one group of five bits
    masks += [blob, np.roll(blob, 40, axis=1), ~blob]
    rles = [{"size": list(m.shape), "counts": r["counts"].decode()} for m in masks
            for r in [coco.encode(np.asfortranarray(m.astype(np.uint8)))]]  # fmt: skip
    page = visit().page
    found = page.evaluate(
        """async rles => {
            const { decode, compared } = await import("/static/rle.js");
            return [rles.map(r => decode(r).data.join('')), rles.map(r => decode(r, 3).data.join('')),
                    rles.slice(1).map((r, k) => r.size.join() === rles[k].size.join() ? compared(rles[k], r) : null)];
        }""",
        rles,
    )
    for mask, whole, third in zip(masks, found[0], found[1], strict=True):
        np.testing.assert_array_equal(digits(whole, mask), mask)
        np.testing.assert_array_equal(digits(third, mask[::3, ::3]), mask[::3, ::3])
    for first, second, value in zip(masks, masks[1:], found[2], strict=False):
        if value is not None:
            either = (first | second).sum()
            assert value["iou"] == pytest.approx((first & second).sum() / either if either else 1)
            assert value["differ"] == (first ^ second).sum()


def test_clicks_boxes_and_undoing(visit: Open) -> None:
    v = visit()
    v.sample()
    before = v.canvas()
    asked, answer = v.click(*ON)
    assert asked["model"] == "eight"
    np.testing.assert_allclose(asked["points"], [ON], atol=0.6)
    assert len(answer["masks"]) == 3
    mask = decoded(answer["masks"][0])
    v.shows("#panel-a .figures", f"{int(mask.sum()):,} pixels")
    expected = resized(mask, before.shape[:2])

    def drawn() -> bool:
        changed = np.abs(v.canvas() - before).max(axis=2) > 8
        return (changed & expected).sum() / (changed | expected).sum() > 0.9

    v.becomes(drawn)
    v.page.check("input[name=candidate][value='1']", force=True)
    v.shows("#panel-a .figures", f"{answer['masks'][1]['area']:,} pixels")

    asked, second = v.click(100, 100, "right")
    assert asked["point_labels"] == [1, 0]
    assert len(second["masks"]) == 1
    v.page.check("input[name=mode][value=remove]", force=True)
    asked, _ = v.click(40, 200)
    assert asked["point_labels"] == [1, 0, 0]
    asked, _ = v.segmented(lambda: v.page.click("#undo"))
    assert asked["point_labels"] == [1, 0]
    v.page.click("#clear")
    until(v.page, "document.querySelector('#panel-a .figures').textContent === ''")
    v.becomes(lambda: v.page.is_disabled("#get-png"))
    v.becomes(lambda: np.array_equal(v.canvas(), before))

    boxes: list[list[float]] = []
    v.page.on("request", lambda r: boxes.append(r.post_data_json["box"]) if r.url.endswith("/segment") else None)
    v.page.keyboard.down("Shift")
    v.page.mouse.move(*v.place(148, 9))
    v.page.mouse.down()
    v.page.mouse.move(*v.place(200, 80), steps=4)
    v.page.mouse.move(*v.place(250, 153), steps=4)
    v.page.mouse.up()
    v.page.keyboard.up("Shift")
    until(v.page, "document.querySelector('#panel-a .figures').textContent !== ''")
    np.testing.assert_allclose(boxes[-1], [148, 9, 250, 153], atol=0.6)


def test_by_keys_alone(visit: Open) -> None:
    v = visit()
    v.sample()
    active = "document.activeElement.id"
    for _ in range(40):
        v.page.keyboard.press("Tab")
        if v.page.evaluate(active) == "stage-a":
            break
    assert v.page.evaluate(active) == "stage-a"
    for _ in range(3):
        v.page.keyboard.press("ArrowRight")
    v.page.keyboard.press("Shift+ArrowDown")
    asked, answer = v.segmented(lambda: v.page.keyboard.press("Enter"))
    assert asked["points"] == [[143.5, 129.5]]  # the middle of the pixel
    v.shows("#said", f"Mask of {answer['masks'][0]['area']:,} pixels")
    v.page.keyboard.press("r")
    v.page.keyboard.press("Delete")
    v.page.keyboard.press("Backspace")
    until(v.page, "document.querySelector('#panel-a .figures').textContent === ''")
    v.page.keyboard.press("b")
    v.shows("#said", "Box begun")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        v.page.keyboard.press(key)
    asked, _ = v.segmented(lambda: v.page.keyboard.press("b"))
    assert asked["box"] == [143, 129, 149, 140]  # both pixels are within


def test_two_models_side_by_side(visit: Open) -> None:
    v = visit()
    v.sample()
    with v.page.expect_response("**/embed"):
        v.page.check("#compare")
    assert v.page.input_value("#model-a") == "original"
    assert v.page.input_value("#model-b") == "eight"
    until(v.page, "[...document.querySelectorAll('.busy')].every(e => e.hidden)")
    answers: list[dict] = []
    v.page.on("response", lambda r: answers.append(r) if r.url.endswith("/segment") else None)
    v.page.mouse.click(*v.place(*ON, "b"))  # a click on either is for both
    until(v.page, "document.querySelector('#iou').textContent !== '–'")
    masks = {r.json()["model"]: r.json()["masks"][0] for r in answers}
    rles = [masks[name]["segmentation"] for name in ("original", "eight")]
    expected = coco.iou([rles[0]], [rles[1]], [0])[0, 0]
    assert float(v.page.inner_text("#iou")) == pytest.approx(expected, abs=6e-4)
    assert 0.5 < expected < 1
    v.shows("#panel-a .facts", "the weights as they were")
    masks = [decoded(masks[name]) for name in ("original", "eight")]
    v.shows("#differ", f"{(masks[0] ^ masks[1]).sum():,} pixels differ")
    for panel, mask, other in zip("ab", masks, masks[::-1], strict=True):
        shown = v.canvas(panel)
        warm = shown[..., 0] - shown[..., 2]
        alone, both = (resized(part, shown.shape[:2]) for part in (mask & ~other, mask & other))
        # Lines of a pixel are smoothed into what is beside them.
        assert not alone.any() or warm[alone].mean() > warm[both].mean() + 80
    v.page.select_option("#model-a", "eight")
    until(v.page, "document.querySelector('#iou').textContent === '1.000'")
    assert v.page.inner_text("#differ") == ""
    v.page.uncheck("#compare")
    v.becomes(lambda: v.page.is_hidden("#panel-b"))


def test_downloads(visit: Open, tmp_path: Path) -> None:
    v = visit()
    v.sample()
    _, answer = v.click(*ON)
    mask, files = decoded(answer["masks"][0]), {}
    for kind in ("png", "rle", "geojson"):
        with v.page.expect_download() as download:
            v.page.click(f"#get-{kind}")
        files[download.value.suggested_filename] = Path(download.value.path()).read_bytes()
    np.testing.assert_array_equal(pixels(files["scene_0-mask.png"]) > 127, mask)
    rle = json.loads(files["scene_0-mask.json"])
    np.testing.assert_array_equal(decoded(rle), mask)
    assert (rle["model"], rle["width"], rle["height"]) == ("eight", 256, 256)
    (feature,) = json.loads(files["scene_0-mask.geojson"])["features"]
    assert feature["geometry"]["type"] == "MultiPolygon"
    assert feature["properties"]["area"] == mask.sum()


def test_a_download_after_the_embedding_is_gone(visit: Open) -> None:
    v = visit(errors=True)  # Chromium notes the 404
    v.sample()
    _, answer = v.click(*ON)
    lost: list[str] = []

    def lose(route: Route) -> None:
        asked = route.request.post_data_json
        lost.append(asked["image_id"])
        asked["image_id"] = "0" * len(lost[0])
        route.continue_(post_data=json.dumps(asked))

    v.page.route("**/segment", lose, times=1)
    v.page.check("input[name=candidate][value='1']", force=True)
    with v.page.expect_download() as download:
        v.page.click("#get-png")
    mask = pixels(Path(download.value.path()).read_bytes()) > 127
    np.testing.assert_array_equal(mask, decoded(answer["masks"][1]))
    assert lost
    assert v.page.is_hidden("#problem")


def test_an_embedding_that_fails_is_told_and_no_longer_awaited(visit: Open) -> None:
    v = visit(errors=True)  # Chromium notes the failure
    v.page.route("**/embed", lambda route: route.abort())
    v.page.click("[aria-label='Sample picture 1']")
    v.page.wait_for_selector("#problem:not([hidden])")
    v.becomes(lambda: v.page.is_hidden("#panel-a .busy"))


def test_compressing_with_progress_to_a_report(visit: Open, service: Api) -> None:
    v = visit()
    page = v.page
    page.wait_for_selector("#report-body .dot")
    page.click("#carried")
    until(page, "document.querySelector('#checkpoint-name').textContent.includes('small_sam.pth')")
    page.click(".more summary")
    page.select_option("#policy", "equal_error")
    page.uncheck("#fidelity")
    page.fill("#name", "made-here")
    page.evaluate(
        """() => { window.told = []; const at = document.querySelector("#job-stage");
           new MutationObserver(() => told.push([at.textContent, document.querySelector("#job-progress").value]))
               .observe(at, { childList: true, characterData: true, subtree: true }); }"""
    )
    page.click("#start")
    until(page, "document.querySelector('#report-model').value === 'made-here'", timeout=90_000)
    told = page.evaluate("told")
    stages = [stage for stage, _ in told]
    assert any(stage.startswith("Uploading") for stage in stages)
    assert "Encoding the tensors" in stages
    assert stages[-1] == "Done"
    until(page, "document.activeElement.id === 'report-title'")
    report = service.http.get("/models/made-here").json()["report"]
    assert report["options"] == {"preset": "5x", "policy": "equal_error", "fidelity": False}
    until(page, f"document.querySelectorAll('#report-body .dot').length === {len(report['tensors'])}")
    cards = page.inner_text("#report-body .cards")
    assert f"{report['ratio']:.2f}×" in cards
    assert f"{report['sqnr_db']:.1f} dB" in cards
    page.click(".tensors summary")
    until(page, f"document.querySelectorAll('#report-body tbody tr').length === {len(report['tensors'])}")
    v.shows("#model-a", "made-here")

    page.select_option("#report-model", "eight")
    page.wait_for_selector(".mean.own")
    found = service.http.get("/models/eight").json()["report"]["fidelity"]["models"]["compressed"]
    v.shows("#report-body .cards", f"{found['mask_iou']:.4f}")
    v.shows("#report-body .cards", f"{found['embedding_cosine']:.5f}")


@pytest.mark.parametrize(("status", "code"), [(503, "unavailable"), (429, "rate_limited")])
def test_a_job_is_followed_through_an_outage(visit: Open, service: Api, status: int, code: str) -> None:
    v = visit(errors=True)
    again = refuse(status, code, **{"Retry-After": "1"})
    v.page.route("**/jobs/*/events", again, times=2)
    v.page.click("#carried")
    v.shows("#checkpoint-name", "small_sam.pth")
    v.page.select_option("#codec", "original")
    name = f"through-{status}"
    v.page.fill("#name", name)
    v.page.click("#start")
    v.shows("#job", "as tested (asking again in 1.5 s)")
    expect(v.page.locator("#job-problem")).to_be_hidden()
    expect(v.page.locator("#report-model")).to_have_value(name, timeout=60_000)
    expect(v.page.locator(f"#model-a option[value={name}]")).to_be_attached()
    expect(v.page.locator("#job-stage")).to_have_text("Done")
    expect(v.page.locator("#job-eta")).to_be_empty()
    expect(v.page.locator("#job-problem")).to_be_hidden()
    service.http.delete(f"/models/{name}").raise_for_status()


def test_what_a_job_does_is_shown_again_after_an_outage_and_its_loss_ends_it(visit: Open) -> None:
    v = visit(errors=True)
    job = {"id": "1", "name": "far", "state": "running", "stage": "encoding", "progress": 0.5, "eta_s": None}
    state = f"id: 7\nevent: job\ndata: {json.dumps(job)}\n\n"
    streams: list[Callable[[Route], object]] = [
        # As the service does it: a state that is known already is not sent again.
        lambda route: route.fulfill(
            content_type="text/event-stream", body=": ping\n\n" if "last-event-id" in route.request.headers else state
        )
    ]
    v.page.route("**/jobs?*", lambda route: route.fulfill(json={"jobs": [job]}))
    v.page.route("**/jobs/1/events", lambda route: streams[-1](route))
    v.page.reload()
    v.shows("#job-stage", "Encoding the tensors")
    streams.append(refuse(503, "unavailable", **{"Retry-After": "2"}))
    v.shows("#job", "as tested (asking again in 2 s)")
    v.page.route("**/jobs/1", refuse(503, "unavailable", **{"Retry-After": "2"}))
    v.page.click("#cancel")
    v.shows("#job-problem", "as tested")
    expect(v.page.locator("#cancel")).to_be_enabled()  # for the job goes on
    streams.append(lambda route: route.abort())
    v.shows("#job", "The service does not answer. Is it still running? (asking again in 1.5 s)")
    del streams[1:]
    expect(v.page.locator("#job-stage")).to_have_text("Encoding the tensors")
    expect(v.page.locator("#job-eta")).to_be_empty()
    streams.append(refuse(503, "unavailable", **{"Retry-After": "3600"}))
    v.shows("#job-problem", "Something that the service needs is missing: as tested")
    v.page.reload()
    streams.append(refuse(404, "unknown_job"))
    v.shows("#job-problem", "as tested")


def test_cancelling(visit: Open) -> None:
    page = visit().page
    page.click("#carried")
    page.wait_for_selector("#start:enabled")
    page.fill("#name", "never")
    page.click("#start")
    until(page, "document.querySelector('#job-stage').textContent.startsWith('Measuring')", timeout=30_000)
    page.click("#cancel")
    until(page, "document.querySelector('#job-stage').textContent === 'Cancelled'", timeout=30_000)
    page.wait_for_selector("#start:enabled")


def test_errors_in_plain_words(visit: Open, tmp_path: Path) -> None:
    v = visit(errors=True)
    v.page.set_input_files("#picture", checkpoint_of(tmp_path / "no.png", b"no picture"))
    v.page.wait_for_selector("#problem:not([hidden])")
    v.shows("#problem", "cannot show this file")
    v.page.set_input_files("#checkpoint", checkpoint_of(tmp_path / "no.pth", b"no checkpoint" * 100))
    v.page.click("#start")
    v.page.wait_for_selector("#job-problem:not([hidden])")
    v.shows("#job-problem", "This file is no checkpoint")
    v.page.set_input_files("#checkpoint", ROOT / "hypersam" / "assets" / "small_sam.pth")
    v.page.fill("#name", "eight")
    v.page.click("#start")
    until(v.page, "document.querySelector('#job-problem').textContent.includes('name is in use')")
    assert v.page.get_attribute("#job-problem", "role") == "alert"


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, visit: Open, tmp_path: Path) -> None:
    secret, key = new_key("page", ["segment"])
    settings = Settings(
        data_dir=tmp_path / "data", port=0, workers=0, device="cpu", register_default=False, api_keys=(key.line(),)
    )
    guarded = Api(settings)
    try:
        v = visit(url=guarded.url, errors=True)
        v.page.wait_for_selector("#problem:not([hidden])")
        v.shows("#problem", "API key")
        v.page.wait_for_selector("#key")
        v.page.fill("#key", secret)
        v.page.keyboard.press("Enter")
        v.page.wait_for_selector("#problem", state="hidden")
        v.shows("#panel-a .facts", "No model yet")
        assert v.page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
        v.page.reload()
        v.shows("#panel-a .facts", "No model yet")
        v.page.set_viewport_size({"width": 320, "height": 640})
        v.becomes(lambda: v.page.evaluate("document.documentElement.scrollWidth") == 320)
        v.page.click("[aria-label='Sample picture 1']")
        expect(v.page.locator("#stage-a")).to_be_in_viewport(ratio=0.9)
        v.shows("#panel-a .facts", "No model yet")
        v.close()
    finally:
        guarded.stop()


def test_a_phone(visit: Open) -> None:
    v = visit(**PHONE)
    v.sample()
    v.page.wait_for_selector("#report-body .dot")
    asked, _ = v.segmented(lambda: v.page.touchscreen.tap(*v.place(*ON)))
    np.testing.assert_allclose(asked["points"], [ON], atol=2)
    x, y = v.place(40, 120)
    wire = v.context.new_cdp_session(v.page)

    def long_press() -> None:
        wire.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        v.page.wait_for_timeout(700)
        wire.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    asked, _ = v.segmented(long_press)
    assert asked["point_labels"] == [1, 0]
    assert v.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]


def test_every_control_has_a_name_and_text_has_contrast(visit: Open) -> None:
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme).page
        page.wait_for_selector("#report-body .dot")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, a, canvas, summary, progress, [role=img]")]
                .filter(e => !(e.getAttribute("aria-label") || e.textContent.trim() && e.tagName !== "SELECT"
                    || [...(e.labels ?? [])].some(l => l.textContent.trim())
                    || document.getElementById(e.getAttribute("aria-labelledby"))))
                .map(e => e.outerHTML.slice(0, 90))"""
        )
        assert nameless == []
        assert page.evaluate("document.documentElement.lang") == "en-GB"
        headings = page.evaluate("[...document.querySelectorAll('h1, h2')].map(e => e.tagName)")
        assert headings == ["H1", "H2", "H2"]
        names = ("ground", "card", "ink", "muted", "accent", "accent-ink", "soft", "bad", "bad-soft")
        colours = page.evaluate(
            "names => names.map(n => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim())",
            list(names),
        )
        by_name = dict(zip(names, map(luminance, colours), strict=True))
        pairs = [(text, ground) for text in ("ink", "muted", "accent") for ground in ("ground", "card")]
        for text, ground in [*pairs, ("accent-ink", "accent"), ("bad", "bad-soft"), ("ink", "soft")]:
            high, low = sorted((by_name[text], by_name[ground]), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, text, ground)


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    assert re.fullmatch("#[0-9a-f]{6}", colour)
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.skipif("HYPERSAM_SCREENSHOTS" not in os.environ, reason="HYPERSAM_SCREENSHOTS is not set")
def test_screenshots(visit: Open) -> None:
    SHOTS.mkdir(exist_ok=True)
    for scheme in ("light", "dark"):
        v = visit(color_scheme=scheme)
        v.sample(1)
        v.click(125, 125)
        v.page.mouse.move(0, 0)
        v.page.evaluate("scrollTo(0, 0)")
        v.page.wait_for_timeout(400)
        v.page.screenshot(path=SHOTS / f"page-{scheme}.png")
    v = visit(viewport={"width": 1280, "height": 1180})  # with room for all of the report beneath the page's head
    v.sample(1)
    with v.page.expect_response("**/embed"):
        v.page.check("#compare")
    until(v.page, "[...document.querySelectorAll('.busy')].every(e => e.hidden)")
    v.page.mouse.click(*v.place(125, 125))
    until(v.page, "document.querySelector('#iou').textContent !== '–'")
    v.page.evaluate("scrollTo(0, 0)")
    v.page.wait_for_timeout(400)
    v.page.screenshot(path=SHOTS / "page-comparison.png")
    v.page.select_option("#report-model", "eight")
    v.page.wait_for_selector(".mean.own")
    v.page.locator("#report").screenshot(path=SHOTS / "page-report.png")
    phone = visit(**PHONE)
    phone.sample(1)
    phone.segmented(lambda: phone.page.touchscreen.tap(*phone.place(125, 125)))
    phone.page.evaluate("scrollTo(0, 0)")
    phone.page.wait_for_timeout(400)
    phone.page.screenshot(path=SHOTS / "page-phone.png")
