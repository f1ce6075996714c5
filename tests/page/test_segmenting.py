"""What the page makes of prompts when answers fail, come late or come out of order, and of unusual gestures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Request, Route, expect

from hypersam.settings import Settings
from tests.page.conftest import CARRIED, ON, UNTOUCHED, Visit, decoded, pixels, refuse
from tests.service.running import Api

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # pycocotools' decoder, with NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
Open = Callable[..., Visit]


def requests_to(v: Visit, path: str) -> list[Request]:
    found: list[Request] = []
    v.page.on("request", lambda r: found.append(r) if r.url.endswith(path) else None)
    return found


def enter_key(v: Visit, key: str) -> None:
    """This service asks for none; but the page asks for everything anew."""
    v.page.eval_on_selector("#key-box", "box => { box.open = true }")
    with v.page.expect_response("**/jobs?*"):
        v.page.fill("#key", key)
        v.page.keyboard.press("Enter")


def pressed(v: Visit, *keys: str, times: int = 1) -> None:
    for _ in range(times):
        for key in keys:
            v.page.keyboard.press(key)


# --- failures


@pytest.mark.parametrize(
    "failure",
    [
        lambda route: route.abort(),
        refuse(503, "overloaded", **{"Retry-After": "120"}),
        refuse(429, "rate_limited", **{"Retry-After": "120"}),
        refuse(500, "internal_error"),
    ],
    ids=["network", "503", "429", "500"],
)
def test_a_click_after_a_failed_embedding_is_answered(visit: Open, failure: Callable[[Route], None]) -> None:
    v = visit(errors=True)
    v.page.route("**/embed", failure)
    v.page.click("[aria-label='Sample picture 1']")
    expect(v.page.locator("#problem")).to_be_visible()
    v.page.mouse.click(*v.place(*ON))
    expect(v.page.locator("#panel-a .figures")).to_contain_text("pixels")
    expect(v.page.locator("#problem")).to_be_hidden()
    asked, _ = v.click(100, 100)
    assert asked["image_id"]  # by then the picture need not be sent


def test_a_refused_picture_stays_told_and_is_not_sent_again(visit: Open) -> None:
    v = visit(errors=True)
    sent = requests_to(v, "/embed"), requests_to(v, "/segment")
    v.page.route("**/embed", refuse(413, "image_too_large"))
    v.page.click("[aria-label='Sample picture 1']")
    v.shows("#problem", "too large")
    for _ in range(2):
        v.page.mouse.click(*v.place(*ON))
        expect(v.page.locator("#clear")).to_be_enabled()
        expect(v.page.locator("#problem")).to_contain_text("too large")
    v.page.click("#clear")
    expect(v.page.locator("#clear")).to_be_disabled()
    expect(v.page.locator("#problem")).to_be_visible()
    assert [len(each) for each in sent] == [1, 0]
    v.page.unroute("**/embed")
    v.sample(1)
    expect(v.page.locator("#problem")).to_be_hidden()
    v.click(125, 125)


def test_an_embedding_is_asked_for_again_when_the_service_says(visit: Open) -> None:
    v = visit(errors=True)
    sent = requests_to(v, "/embed")
    v.page.route("**/embed", refuse(503, "overloaded", **{"Retry-After": "2"}), times=1)
    v.page.click("[aria-label='Sample picture 1']")
    v.shows("#panel-a .busy", "too much to do: as tested (asking again in 2 s)")
    v.page.mouse.click(*v.place(*ON))  # is answered then
    expect(v.page.locator("#panel-a .figures")).to_contain_text("pixels")
    expect(v.page.locator("#panel-a .busy")).to_be_hidden()
    expect(v.page.locator("#problem")).to_be_hidden()
    assert len(sent) == 2


def test_a_picture_chosen_meanwhile_ends_the_waiting(visit: Open) -> None:
    v = visit(errors=True)
    v.page.route("**/embed", refuse(503, "overloaded", **{"Retry-After": "25"}), times=1)
    v.page.click("[aria-label='Sample picture 1']")
    v.shows("#panel-a .busy", "asking again in 25 s")
    v.sample(1)  # waits for the sign to go
    v.click(125, 125)


def test_a_service_that_holds_no_embeddings(visit: Open, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path / "data", port=0, workers=1, device="cpu", register_default=False, embedding_cache_bytes=0
    )
    forgetful = Api(settings)
    try:
        sent = forgetful.compress(CARRIED, name="original", options=UNTOUCHED)
        assert forgetful.wait_job(sent.json()["id"])["state"] == "succeeded", forgetful.output()
        v = visit(url=forgetful.url, errors=True)
        embeds, questions = requests_to(v, "/embed"), requests_to(v, "/segment")
        v.sample()
        v.page.mouse.click(*v.place(*ON))
        expect(v.page.locator("#panel-a .figures")).to_contain_text("pixels")
        expect(v.page.locator("#candidates")).to_be_visible()
        v.page.mouse.click(*v.place(100, 100), button="right")
        expect(v.page.locator("#candidates")).to_be_hidden()
        with v.page.expect_download() as download:
            v.page.click("#get-png")
        assert pixels(Path(download.value.path()).read_bytes()).shape == (256, 256)
        expect(v.page.locator("#problem")).to_be_hidden()
        assert [len(embeds), len(questions)] == [1, 6]  # by the id, which is unknown, and then with the picture
        v.close()
    finally:
        forgetful.stop()


# --- what is shown while something else is awaited


def test_a_download_is_of_what_is_shown(visit: Open) -> None:
    v = visit()
    v.sample()
    _, answer = v.click(*ON)
    v.page.check("input[name=candidate][value='1']", force=True)
    v.shows("#panel-a .figures", f"{answer['masks'][1]['area']:,} pixels")
    held: list[Route] = []

    def hold(route: Route) -> None:
        if len(route.request.post_data_json["points"]) > 1:
            held.append(route)
        else:
            route.continue_()

    v.page.route("**/segment", hold)
    v.page.mouse.click(*v.place(100, 100), button="right")
    v.becomes(lambda: held)
    files = {}
    for kind in ("png", "rle", "geojson"):
        with v.page.expect_download() as download:
            v.page.click(f"#get-{kind}")
        files[kind] = Path(download.value.path()).read_bytes()
    shown = decoded(answer["masks"][1])
    np.testing.assert_array_equal(pixels(files["png"]) > 127, shown)
    rle = json.loads(files["rle"])
    np.testing.assert_array_equal(decoded(rle), shown)
    assert [point["label"] for point in rle["points"]] == [1]
    (feature,) = json.loads(files["geojson"])["features"]
    assert feature["properties"]["area"] == shown.sum()
    held[0].continue_()
    expect(v.page.locator("#candidates")).to_be_hidden()
    expect(v.page.locator("#problem")).to_be_hidden()
    with v.page.expect_download() as download:
        v.page.click("#get-rle")
    assert [point["label"] for point in json.loads(Path(download.value.path()).read_bytes())["points"]] == [1, 0]


def test_of_two_pictures_the_one_chosen_last_is_shown(visit: Open) -> None:
    v = visit()
    held: list[Route] = []
    v.page.route("**/scene_0.png", lambda route: held.append(route))
    v.page.click("[aria-label='Sample picture 1']")
    v.becomes(lambda: held)
    v.sample(1)
    v.click(125, 125)
    with v.page.expect_event("requestfinished", lambda request: request.url.endswith("scene_0.png")):
        held[0].continue_()
    v.page.wait_for_timeout(200)  # in which it could be decoded
    expect(v.page.locator("#panel-a .figures")).to_contain_text("pixels")
    with v.page.expect_download() as download:
        v.page.click("#get-rle")
    assert download.value.suggested_filename == "scene_1-mask.json"


def test_another_picture_begins_anew(visit: Open) -> None:
    v = visit()
    v.sample()
    v.click(*ON)
    v.page.check("input[name=candidate][value='2']", force=True)
    v.sample(1)
    expect(v.page.locator("#undo")).to_be_disabled()
    expect(v.page.locator("#clear")).to_be_disabled()
    _, answer = v.click(125, 125)
    v.shows("#panel-a .figures", f"{answer['masks'][0]['area']:,} pixels")  # the best


def test_models_that_are_gone(visit: Open, service: Api) -> None:
    v = visit()
    found = {model["id"]: model for model in service.http.get("/models").json()["models"]}
    original, eight = found["original"], found["eight"]
    third = {**eight, "id": "third", "artifact_sha256": "0" * 64}
    models = [original, eight, third]
    v.page.route("**/models", lambda route: route.fulfill(json={"models": models}))
    enter_key(v, "first")
    variants = v.page.locator("#variant option").count()
    v.page.select_option("#model-a", "third")
    models.remove(third)
    enter_key(v, "second")
    expect(v.page.locator("#model-a")).to_have_value("eight")
    expect(v.page.locator("#variant option")).to_have_count(variants)

    v.sample()
    with v.page.expect_response("**/embed"):
        v.page.check("#compare")
    models.remove(original)
    enter_key(v, "third")
    expect(v.page.locator("#panel-b")).to_be_hidden()
    expect(v.page.locator("#compare")).not_to_be_checked()
    expect(v.page.locator("#compare")).to_be_disabled()
    expect(v.page.locator("#panel-a .busy")).to_be_hidden()

    held: list[Route] = []
    v.page.route("**/embed", lambda route: held.append(route))
    v.page.click("[aria-label='Sample picture 2']")
    expect(v.page.locator("#panel-a .busy")).to_be_visible()
    models.clear()
    enter_key(v, "fourth")
    v.shows("#panel-a .facts", "No model yet")
    expect(v.page.locator("#panel-a .busy")).to_be_hidden()


def test_a_model_that_is_gone_leaves_the_lists_and_its_problem_ends_with_the_next_choice(
    visit: Open, service: Api
) -> None:
    sent = service.compress(CARRIED, name="doomed", options=UNTOUCHED)
    assert service.wait_job(sent.json()["id"])["state"] == "succeeded", service.output()
    v = visit(errors=True)
    expect(v.page.locator("#model-a option[value=doomed]")).to_be_attached()
    expect(v.page.locator("#report-model option[value=doomed]")).to_be_attached()
    v.sample()
    v.click(*ON)
    assert service.http.delete("/models/doomed").status_code == 204
    v.page.select_option("#model-a", "doomed")
    v.shows("#problem", "The model is gone")
    for name in ("model-a", "model-b", "report-model"):
        expect(v.page.locator(f"#{name} option[value=doomed]")).not_to_be_attached()
    expect(v.page.locator("#model-a")).to_have_value("eight")
    v.shows("#panel-a .figures", "pixels")
    expect(v.page.locator("#problem")).to_be_visible()  # says why another model answers
    v.page.select_option("#model-a", "original")
    expect(v.page.locator("#problem")).to_be_hidden()
    v.shows("#panel-a .figures", "pixels")
    expect(v.page.locator("#problem")).to_be_hidden()


def test_another_name_of_the_same_artifact_is_asked_in_its_place(visit: Open, service: Api) -> None:
    v = visit(errors=True)
    eight = service.http.get("/models/eight").json()
    models = [eight, {**eight, "id": "doomed"}]
    v.page.route("**/models", lambda route: route.fulfill(json={"models": models}))
    enter_key(v, "first")
    v.sample()
    v.click(*ON)
    models.pop()
    v.page.select_option("#model-a", "doomed")
    v.shows("#problem", "The model is gone")
    expect(v.page.locator("#model-a")).to_have_value("eight")
    v.shows("#panel-a .figures", "pixels")


def test_a_list_that_goes_on_naming_a_model_that_is_gone_is_asked_for_once(visit: Open, service: Api) -> None:
    v = visit(errors=True)
    eight = service.http.get("/models/eight").json()
    models = [eight, {**eight, "id": "doomed", "artifact_sha256": "0" * 64}]
    v.page.route("**/models", lambda route: route.fulfill(json={"models": models}))
    enter_key(v, "first")
    lists = requests_to(v, "/models")
    with v.page.expect_response("**/models/doomed"):
        v.page.select_option("#report-model", "doomed")
    v.shows("#problem", "The model is gone")
    v.becomes(lambda: lists)
    v.page.wait_for_timeout(500)  # in which it could be asked for again
    assert len(lists) == 1
    v.sample()
    v.page.select_option("#model-a", "doomed")
    v.becomes(lambda: len(lists) == 2)
    v.page.wait_for_timeout(500)
    assert len(lists) == 2


def test_the_report_is_of_the_model_chosen_last(visit: Open) -> None:
    v = visit()
    v.page.select_option("#report-model", "eight")
    v.page.wait_for_selector(".mean.own")
    held: list[Route] = []
    v.page.route("**/models/original", lambda route: held.append(route))
    v.page.select_option("#report-model", "original")
    v.becomes(lambda: held)
    v.page.select_option("#report-model", "eight")
    with v.page.expect_event("requestfinished", lambda request: request.url.endswith("/models/original")):
        held[0].continue_()
    v.page.wait_for_timeout(200)  # in which it could be drawn
    expect(v.page.locator(".mean.own")).to_be_visible()


# --- gestures and keys


def test_a_drag_along_a_line_is_no_box(visit: Open) -> None:
    v = visit()
    v.sample()
    questions = requests_to(v, "/segment")
    v.page.mouse.move(*v.place(60, 100))
    v.page.mouse.down()
    v.page.mouse.move(*v.place(200, 100), steps=5)
    v.page.mouse.up()
    v.shows("#said", "A box needs two corners")
    expect(v.page.locator("#undo")).to_be_disabled()
    assert not questions
    v.click(*ON)
    v.page.mouse.move(*v.place(60, 100))
    v.page.mouse.down()
    v.page.mouse.move(*v.place(200, 180), steps=5)  # a box, for a while
    v.page.mouse.move(*v.place(200, 100))
    v.page.mouse.up()
    expect(v.page.locator("#problem")).to_be_hidden()
    v.page.mouse.click(*v.place(100, 100), button="right")
    v.becomes(lambda: questions[-1].post_data_json.get("point_labels") == [1, 0])
    assert "box" not in questions[-1].post_data_json
    v.page.click("#undo")
    v.page.click("#undo")
    expect(v.page.locator("#undo")).to_be_disabled()


def test_a_box_that_the_browser_takes_the_pointer_from_is_taken_back(visit: Open) -> None:
    v = visit(has_touch=True)
    wire = v.context.new_cdp_session(v.page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [dict(zip("xy", v.place(*place), strict=True)) for place in places]
        wire.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    v.sample()
    before = v.canvas()
    v.page.check("input[name=mode][value=box]", force=True)
    with v.page.expect_response("**/segment"):
        touch("touchStart", (60, 60))
        touch("touchMove", (90, 90))
        touch("touchMove", (120, 120))
    expect(v.page.locator("#clear")).to_be_enabled()
    touch("touchCancel")
    expect(v.page.locator("#clear")).to_be_disabled()
    expect(v.page.locator("#undo")).to_be_disabled()
    v.becomes(lambda: np.array_equal(v.canvas(), before))
    v.page.check("input[name=mode][value=add]", force=True)
    v.click(*ON)
    v.page.mouse.move(*v.place(148, 9))
    v.page.mouse.down()
    v.page.mouse.move(*v.place(250, 153), steps=4)
    v.page.mouse.up()
    expect(v.page.locator("#candidates")).to_be_hidden()
    questions = requests_to(v, "/segment")
    v.page.click("#undo")
    expect(v.page.locator("#candidates")).to_be_visible()  # as of the single click
    assert questions[-1].post_data_json["point_labels"] == [1]
    assert "box" not in questions[-1].post_data_json


def test_a_second_pointer_does_not_draw(visit: Open) -> None:
    v = visit()
    v.sample()
    v.page.mouse.move(*v.place(60, 60))
    v.page.mouse.down()
    v.page.mouse.move(*v.place(150, 150), steps=4)
    x, y = v.place(20, 20)
    other = {"pointerId": 99, "pointerType": "touch", "isPrimary": False, "clientX": x, "clientY": y}
    for kind in ("pointerdown", "pointermove", "pointerup"):
        v.page.dispatch_event("#stage-a", kind, other)
    expect(v.page.locator("#undo")).to_be_disabled()  # the box is still being drawn
    questions = requests_to(v, "/segment")
    v.page.mouse.up()
    expect(v.page.locator("#undo")).to_be_enabled()
    v.becomes(lambda: questions)
    np.testing.assert_allclose(questions[-1].post_data_json["box"], [60, 60, 150, 150], atol=0.6)


def test_the_end_of_a_mask_is_announced(visit: Open) -> None:
    v = visit(errors=True)
    v.sample()
    for end in ("#clear", "#undo"):
        v.click(*ON)
        v.shows("#said", "Mask of")
        v.page.click(end)
        expect(v.page.locator("#said")).to_have_text("No prompts are left, and no mask.")
    v.click(*ON)
    v.shows("#said", "Mask of")
    v.page.route("**/segment", refuse(503, "overloaded"))
    v.page.mouse.click(*v.place(100, 100))
    v.shows("#problem", "too much to do")
    expect(v.page.locator("#said")).to_have_text("")


def test_keys_reach_every_pixel(visit: Open) -> None:
    v = visit()
    v.sample()
    v.page.focus("#stage-a")
    pressed(v, "ArrowLeft", "ArrowUp", times=30)
    asked, _ = v.segmented(lambda: pressed(v, "Enter"))
    assert asked["points"] == [[0.5, 0.5]]
    pressed(v, "Backspace", "b")
    pressed(v, "ArrowRight", "ArrowDown", times=55)
    asked, _ = v.segmented(lambda: pressed(v, "b"))
    assert asked["box"] == [0, 0, 256, 256]
    pressed(v, "b")  # from the last pixel back to the first
    pressed(v, "ArrowLeft", "ArrowUp", times=55)
    asked, _ = v.segmented(lambda: pressed(v, "b"))
    assert asked["box"] == [0, 0, 256, 256]
