"""Label Studio's ML backend protocol, from what its editor really sends."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from service.label_studio.answers import polygons_of
from service.label_studio.brush_rle import pack
from tests.service.running import Api, assert_problem, best, picture

CONFIG = """
<View>
  <Image name="img" value="$photo" zoom="true"/>
  <BrushLabels name="brush" toName="img"><Label value="Aeroplane"/><Label value="Car"/></BrushLabels>
  <KeyPointLabels name="point" toName="img" smart="true"><Label value="Aeroplane" smart="true"/></KeyPointLabels>
  <RectangleLabels name="box" toName="img" smart="true"><Label value="Car" smart="true"/></RectangleLabels>
</View>
"""
POINT = {
    "original_width": 96, "original_height": 64, "image_rotation": 0, "from_name": "point", "to_name": "img",
    "type": "keypointlabels", "origin": "manual", "is_positive": True, "id": "a",
    "value": {"x": 100 * 30 / 96, "y": 100 * 20 / 64, "width": 0.3, "keypointlabels": ["Aeroplane"]},
}  # fmt: skip
NOT_THIS = {**POINT, "is_positive": False, "value": {**POINT["value"], "x": 100 * 5 / 96}}  # type: ignore[dict-item]
BOX = {
    "original_width": 96, "original_height": 64, "from_name": "box", "to_name": "img", "type": "rectanglelabels",
    "value": {"x": 100 * 10 / 96, "y": 100 * 10 / 64, "width": 100 * 50 / 96, "height": 100 * 40 / 64,
              "rotation": 0, "rectanglelabels": ["Car"]},
}  # fmt: skip


def asked(source: str, *regions: dict[str, Any]) -> dict[str, Any]:
    """What Label Studio's connector sends while an annotator draws."""
    return {
        "tasks": [{"id": 7, "data": {"photo": source}, "project": 1, "annotations": [], "predictions": []}],
        "model_version": "any", "project": "1.1690000000", "label_config": CONFIG,
        "params": {"login": None, "password": None, "context": {"result": list(regions)} if regions else None},
    }  # fmt: skip


def unpacked(rle: list[int]) -> np.ndarray:
    """By the decoder that @thi.ng/rle-pack documents."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    at = 0

    def read(width: int) -> int:
        nonlocal at
        at += width
        return int(bits[at - width : at], 2)

    count, word = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        run = read(1)
        length = read(widths[read(2)]) + 1
        values += [read(word)] * length if run else [read(word) for _ in range(length)]
    return np.array(values, np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 96), (300, 400)])
def test_brush_masks_are_packed_as_label_studio_reads_them(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for mask in (np.zeros(shape, bool), np.ones(shape, bool), rng.random(shape) < 0.5, np.tri(*shape, dtype=bool)):
        values = unpacked(pack(mask)).reshape(*shape, 4)
        assert np.array_equal(values, np.repeat(mask[..., None], 4, axis=2) * 255)


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def test_label_studio_asks_and_gets_a_brush(api: Api, model: str) -> None:
    at = f"/label-studio/{model}"
    assert api.http.get(f"{at}/health").json()["status"] == "UP"
    assert api.http.get("/health").json()["status"] == "UP"
    setup = {"project": "1.1690000000", "schema": CONFIG, "hostname": "http://ls", "access_token": "t"}
    assert api.http.post(f"{at}/setup", json=setup).json() == {"model_version": model}
    image = picture()
    for regions, prompt, label in (
        ((POINT,), {"points": [[30, 20]]}, "Aeroplane"),
        ((POINT, NOT_THIS), {"points": [[30, 20], [5, 20]], "labels": [1, 0]}, "Aeroplane"),
        ((BOX,), {"box": [10, 10, 60, 50]}, "Car"),
        ((POINT, BOX), {"points": [[30, 20]], "box": [10, 10, 60, 50]}, "Car"),
    ):
        answer = api.http.post(f"{at}/predict", json=asked(data_uri(image), *regions)).raise_for_status().json()
        assert answer["model_version"] == model
        (prediction,) = answer["results"]
        (region,) = prediction["result"]
        wanted, score = best(api, model, image, **prompt)
        assert (region["type"], region["from_name"], region["to_name"]) == ("brushlabels", "brush", "img")
        assert (region["original_width"], region["original_height"]) == (96, 64)
        assert region["value"]["format"] == "rle"
        assert region["value"]["brushlabels"] == [label]
        assert np.array_equal(unpacked(region["value"]["rle"]).reshape(64, 96, 4)[..., 3] > 0, wanted)
        assert prediction["score"] == pytest.approx(score, abs=1e-5)
    nothing = api.http.post(f"{at}/predict", json=asked("/data/upload/1/a.png")).json()
    assert [one["result"] for one in nothing["results"]] == [[]]


def test_label_studios_mistakes(api: Api, model: str) -> None:
    at, uri = f"/label-studio/{model}/predict", data_uri(picture())
    assert_problem(api.http.post("/label-studio/none/setup", json={}), 404, "unknown_model")
    assert_problem(api.http.post("/setup", json={}), 404, "unknown_model")  # the default model is not made here
    for change, says in (
        ({"label_config": "<View>"}, "label_config"),
        ({"label_config": "<View/>"}, "BrushLabels"),
        ({"tasks": [{"data": {}}]}, "tasks.data.photo"),
        ({"tasks": 3}, "tasks"),
        ({"params": {"context": {"result": [{**POINT, "value": {"x": 1}}]}}}, "params.context.result.0"),
        ({"params": {"context": {"result": [{"type": "textarea"}]}}}, "params.context.result"),
    ):
        response = api.http.post(at, json={**asked(uri, POINT), **change})
        assert response.status_code == 422, response.text
        problem = response.json()
        told = [".".join(error["loc"]) for error in problem.get("errors", [])]
        assert says in " ".join([problem["detail"], *told])
    for value in ("NaN", "1e400", "1" + "0" * 400, "-1e308", '"x"', "null", "[]"):
        for region, key in ((POINT, "x"), (POINT, "original_width"), (POINT, "is_positive"), (BOX, "width")):
            wrong = json.dumps(
                {**region, **({"value": {**region["value"], key: "?"}} if key in region["value"] else {key: "?"})}
            )
            body = json.dumps(asked(uri)).replace('"context": null', f'"context": {{"result": [{wrong}]}}')
            response = api.http.post(
                at, content=body.replace('"?"', value), headers={"Content-Type": "application/json"}
            )
            assert response.status_code in (200, 422), (key, value, response.text)
    # Entities in entities, and tags in tags.
    laughs = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    for config in (
        f'<!DOCTYPE v [<!ENTITY a0 "ha">{laughs}]><View a="&a11;">&a11;</View>',
        "<a>" * 100_000 + "</a>" * 100_000,
    ):
        response = api.http.post(at, json={**asked(uri, POINT), "label_config": config})
        assert_problem(response, 422, "invalid_request")
        assert len(response.content) < 2000
    refused = api.http.post(at, json=asked("http://169.254.169.254/latest/meta-data", POINT))
    assert_problem(refused, 403, "source_not_allowed")


def mask_of(result: dict[str, Any]) -> np.ndarray:
    size = result["original_height"], result["original_width"], 4
    return unpacked(result["value"]["rle"]).reshape(size)[..., 3] > 0


def predicted(
    api: Api, model: str, config: str, data: dict[str, Any] | list[dict[str, Any]], *regions: dict[str, Any]
) -> list[list[dict[str, Any]]]:
    """The results for each task."""
    tasks = [{"id": n, "data": each} for n, each in enumerate(data if isinstance(data, list) else [data])]
    body = {**asked("", *regions), "label_config": config, "tasks": tasks}
    response = api.http.post(f"/label-studio/{model}/predict", json=body)
    assert response.status_code == 200, response.text
    return [each["result"] for each in response.json()["results"]]


def refused(api: Api, model: str, config: str, data: dict[str, Any], *regions: dict[str, Any]) -> str:
    """What is wrong with a request."""
    body = {**asked("", *regions), "label_config": config, "tasks": [{"data": data}]}
    response = api.http.post(f"/label-studio/{model}/predict", json=body)
    assert response.status_code == 422, response.text
    return str(response.json()["detail"])


def view(*tags: str) -> str:
    return f"<View>{''.join(tags)}</View>"


LEFT, RIGHT = '<Image name="left" value="$one"/>', '<Image name="right" value="$two"/>'
BRUSHES = (
    '<BrushLabels name="left-brush" toName="left"><Label value="Aeroplane"/></BrushLabels>',
    '<BrushLabels name="right-brush" toName="right"><Label value="Aeroplane"/></BrushLabels>',
)


def test_the_region_decides_which_picture_is_segmented_and_which_tag_takes_the_mask(api: Api, model: str) -> None:
    one, two = picture(), picture(seed=1)
    data = {"one": data_uri(one), "two": data_uri(two)}
    on_left, on_right = {**POINT, "to_name": "left"}, {**POINT, "to_name": "right"}
    wanted = {name: best(api, model, image, points=[[30, 20]])[0] for name, image in (("left", one), ("right", two))}
    assert not np.array_equal(wanted["left"], wanted["right"])
    both = view(LEFT, RIGHT, *BRUSHES)
    for config, given, region, name in (
        (both, data, on_left, "left"),
        (both, data, on_right, "right"),
        (view(LEFT, RIGHT, BRUSHES[1]), data, on_right, "right"),  # the first picture has no brush
        (view(LEFT, RIGHT, BRUSHES[1]), {"two": data["two"]}, on_right, "right"),  # and need not be there
        (view(LEFT, RIGHT, BRUSHES[1]), data, {k: v for k, v in on_right.items() if k != "to_name"}, "right"),
        (view(BRUSHES[0], RIGHT, BRUSHES[1]), data, {k: v for k, v in on_right.items() if k != "to_name"}, "right"),
        (both.replace("Image", "image").replace("BrushLabels", "brushlabels"), data, on_right, "right"),
        (view(LEFT, RIGHT, BRUSHES[0].replace('"left"', '"left,right"')), data, on_right, "right"),
    ):
        ((result,),) = predicted(api, model, config, given, region)
        assert result["to_name"] == name
        assert result["from_name"] in (f"{name}-brush", "left-brush" if "left,right" in config else f"{name}-brush")
        assert np.array_equal(mask_of(result), wanted[name])
    # Regions on both at once, as a client of its own may send them.
    (results,) = predicted(api, model, both, data, on_left, on_right)
    assert [result["from_name"] for result in results] == ["left-brush", "right-brush"]
    assert [np.array_equal(mask_of(result), wanted[result["to_name"]]) for result in results] == [True, True]
    for config, region in ((view(LEFT, RIGHT, BRUSHES[1]), on_left), (both, {**POINT, "to_name": "middle"})):
        says = refused(api, model, config, data, region)
        assert "BrushLabels" in says
        assert region["to_name"] in says


def test_of_several_brushes_for_a_picture_the_one_with_the_label_takes_it(api: Api, model: str) -> None:
    config = view(
        RIGHT,
        '<BrushLabels name="ships" toName="right"><Label value="Ship"/></BrushLabels>',
        '<BrushLabels name="all" toName="right"><View><Label value="Aeroplane" alias="plane"/></View></BrushLabels>',
        '<KeyPointLabels name="k" toName="right"><Label value="Aeroplane" alias="a"/></KeyPointLabels>',
    )
    data = {"two": data_uri(picture())}
    for drawn, tag, label in (
        ("Ship", "ships", "Ship"),
        ("Aeroplane", "all", "plane"),  # saved by its alias
        ("plane", "all", "plane"),
        ("Other", "ships", "Other"),  # labels may come from the task
    ):
        region = {
            **POINT,
            "to_name": "right",
            "from_name": "other",
            "value": {**POINT["value"], "keypointlabels": [drawn]},
        }
        ((result,),) = predicted(api, model, config, data, region)
        assert (result["from_name"], result["value"]["brushlabels"]) == (tag, [label])
    # The tag that it was drawn by has an alias of its own.
    region = {**POINT, "to_name": "right", "from_name": "k", "value": {**POINT["value"], "keypointlabels": ["a"]}}
    only = config.replace('<BrushLabels name="ships" toName="right"><Label value="Ship"/></BrushLabels>', "")
    for given in (config, only):
        ((result,),) = predicted(api, model, given, data, region)
        assert (result["from_name"], result["value"]["brushlabels"]) == ("all", ["plane"])
    two = {**region, "value": {**POINT["value"], "keypointlabels": ["a", "Ship"]}}
    ((result,),) = predicted(api, model, only, data, two)
    assert result["value"]["brushlabels"] == ["plane", "Ship"]


def test_each_rectangle_gets_a_mask_and_key_points_one_together(api: Api, model: str) -> None:
    image = picture()
    data = {"photo": data_uri(image)}
    other = {**BOX, "value": {**BOX["value"], "x": 50.0, "y": 50.0, "width": 25.0, "height": 25.0}}  # type: ignore[dict-item]
    (results,) = predicted(api, model, CONFIG, data, BOX, other)
    for result, box in zip(results, ([10, 10, 60, 50], [48, 32, 72, 48]), strict=True):
        assert np.array_equal(mask_of(result), best(api, model, image, box=box)[0])
    assert len({result["id"] for result in results}) == 2
    (results,) = predicted(api, model, CONFIG, data, POINT, NOT_THIS, POINT)
    (result,) = results
    clicks = {"points": [[30, 20], [5, 20], [30, 20]], "labels": [1, 0, 1]}
    assert np.array_equal(mask_of(result), best(api, model, image, **clicks)[0])
    assert "several rectangles" in refused(api, model, CONFIG, data, BOX, POINT, other)
    most = api.settings.max_prompts
    assert str(most) in refused(api, model, CONFIG, data, *[BOX] * (most + 1))


def test_a_click_on_what_does_not_belong_names_nothing(api: Api, model: str) -> None:
    not_car = {**NOT_THIS, "value": {**NOT_THIS["value"], "keypointlabels": ["Car"]}}  # type: ignore[dict-item]
    ((result,),) = predicted(api, model, CONFIG, {"photo": data_uri(picture())}, POINT, not_car)
    assert result["value"]["brushlabels"] == ["Aeroplane"]


def turned(degrees: float, **value: float) -> dict[str, Any]:
    return {**BOX, "value": {**BOX["value"], "rotation": degrees, **value}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("region", "prompt"),
    [
        # 48 x 16 pixels from (48, 16), turned clockwise about that corner.
        (turned(0, x=50, y=25, width=50, height=25), {"box": [48, 16, 96, 32]}),
        (turned(90, x=50, y=25, width=50, height=25), {"box": [32, 16, 48, 64]}),
        (turned(180, x=50, y=25, width=50, height=25), {"box": [0, 0, 48, 16]}),
        (turned(45, x=50, y=25, width=25, height=25), {"box": [36.686292, 16, 64.970563, 44.284271]}),
        (turned(0, x=-1, y=25, width=200, height=25), {"box": [0, 16, 96, 32]}),
        ({**POINT, "value": {"x": 100.0001, "y": -0.0001}}, {"points": [[96, 0]]}),
    ],
)
def test_where_regions_lie(api: Api, model: str, region: dict[str, Any], prompt: dict[str, Any]) -> None:
    image = picture()
    ((result,),) = predicted(api, model, CONFIG, {"photo": data_uri(image)}, region)
    assert np.array_equal(mask_of(result), best(api, model, image, **prompt)[0])


def test_what_is_not_in_the_picture_is_refused(api: Api, model: str) -> None:
    data = {"photo": data_uri(picture())}
    assert "outside" in refused(api, model, CONFIG, data, {**POINT, "value": {"x": 150, "y": 10}})
    assert "box" in refused(api, model, CONFIG, data, turned(0, x=101, y=25, width=50, height=25))
    assert "box" in refused(api, model, CONFIG, data, turned(180, x=0, y=0, width=50, height=25))


def test_regions_are_of_the_picture_as_it_is_shown(api: Api, model: str) -> None:
    """Browsers turn it as its EXIF says; the editor's own turning (image_rotation) changes no coordinates."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = picture(64, 96, form="JPEG", exif=exif)  # is shown as 96 x 64
    uri = "data:image/jpeg;base64," + base64.b64encode(lying).decode()
    region = {**POINT, "image_rotation": 90}
    ((result,),) = predicted(api, model, CONFIG, {"photo": uri}, region)
    assert np.array_equal(mask_of(result), best(api, model, lying, points=[[30, 20]])[0])
    assert (result["original_width"], result["original_height"], result["image_rotation"]) == (96, 64, 90)
    wrong = {**POINT, "original_width": 64, "original_height": 96}
    says = refused(api, model, CONFIG, {"photo": uri}, wrong)
    assert "64 x 96" in says
    assert "96 x 64" in says
    assert "different sizes" in refused(api, model, CONFIG, {"photo": uri}, wrong, POINT)


def test_pictures_in_a_list(api: Api, model: str) -> None:
    images = [picture(), picture(seed=1)]
    config = view(RIGHT.replace("value=", "valueList="), BRUSHES[1])
    data = {"two": [data_uri(image) for image in images]}
    for item, image in enumerate(images):
        ((result,),) = predicted(api, model, config, data, {**POINT, "to_name": "right", "item_index": item})
        assert result["item_index"] == item
        assert np.array_equal(mask_of(result), best(api, model, image, points=[[30, 20]])[0])
    for item in (2, -1):
        assert "tasks.data.two" in refused(api, model, config, data, {**POINT, "to_name": "right", "item_index": item})


def test_several_tasks_have_pictures_of_their_own(api: Api, model: str) -> None:
    images = [picture(), picture(seed=1)]
    found = predicted(api, model, CONFIG, [{"photo": data_uri(image)} for image in images], POINT)
    for (result,), image in zip(found, images, strict=True):
        assert np.array_equal(mask_of(result), best(api, model, image, points=[[30, 20]])[0])


@pytest.mark.parametrize("params", [None, {}, {"context": None}, {"context": {}}, {"context": {"result": None}}])
def test_nothing_is_drawn_yet(api: Api, model: str, params: dict[str, Any] | None) -> None:
    body = {**asked(data_uri(picture())), "params": params}
    answer = api.http.post(f"/label-studio/{model}/predict", json=body).raise_for_status().json()
    assert [one["result"] for one in answer["results"]] == [[]]


POLYGONS = view(RIGHT, '<PolygonLabels name="poly" toName="right"><Label value="Aeroplane"/></PolygonLabels>')


def filled(polygons: list[list[list[float]]], width: int, height: int) -> np.ndarray:
    """Polygons in per cent as pixels whose centres they hold."""
    large = Image.new("1", (8 * width, 8 * height))
    for points in polygons:
        ImageDraw.Draw(large).polygon([(8 * width * x / 100, 8 * height * y / 100) for x, y in points], fill=1)
    return np.asarray(large)[4::8, 4::8]


def test_polygons_are_answered_where_the_project_has_no_brush(api: Api, model: str) -> None:
    image = picture()
    region = {**BOX, "to_name": "right", "value": {**BOX["value"], "rectanglelabels": ["Aeroplane"]}}  # type: ignore[dict-item]
    (results,) = predicted(api, model, POLYGONS, {"two": data_uri(image)}, region)
    wanted = polygons_of(best(api, model, image, box=[10, 10, 60, 50])[0])
    assert [result["value"].pop("points") for result in results] == wanted
    assert wanted
    for result in results:
        assert result["value"] == {"closed": True, "polygonlabels": ["Aeroplane"]}
        assert (result["type"], result["from_name"], result["to_name"]) == ("polygonlabels", "poly", "right")
        assert (result["original_width"], result["original_height"]) == (96, 64)
    # Where there is a brush too, it takes the mask.
    both = POLYGONS.replace("</View>", f"{BRUSHES[1]}</View>")
    ((result,),) = predicted(api, model, both, {"two": data_uri(image)}, region)
    assert result["from_name"] == "right-brush"


def test_polygons_follow_the_mask() -> None:
    y, x = np.mgrid[:200, :300]
    disc = (x - 100) ** 2 + (y - 90) ** 2 < 70**2
    mask = disc & ((x - 100) ** 2 + (y - 90) ** 2 > 20**2)  # with a hole
    mask |= (abs(x - 240) < 30) & (abs(y - 150) < 30)
    mask[2, 290] = True
    polygons = polygons_of(mask)
    assert len(polygons) == 2  # the largest first, without the speck
    wanted = disc | ((abs(x - 240) < 30) & (abs(y - 150) < 30))
    found = filled(polygons, 300, 200)
    assert (found & wanted).sum() / (found | wanted).sum() > 0.97
    assert len(polygons[0]) < 40
    assert len(polygons[1]) == 4
    (whole,) = polygons_of(np.ones((100, 200), bool))
    assert len(whole) == 4
    assert filled([whole], 200, 100).mean() > 0.98
    assert polygons_of(np.zeros((10, 20), bool)) == []
    dot = np.zeros((10, 20), bool)
    dot[3, 4] = True
    (single,) = polygons_of(dot)
    assert len(single) >= 3
    rng = np.random.default_rng(0)
    for points in polygons_of(rng.random((64, 96)) < 0.6):
        assert len(points) >= 3
        assert np.min(points) >= 0
        assert np.max(points) <= 100


@pytest.mark.parametrize("kind", ["brush", "polygon"])
def test_tags_whose_labels_are_apart(api: Api, model: str, kind: str) -> None:
    """A Rectangle and a Labels tag each have a result of the same id, in the question and in the answer."""
    tag = {"brush": '<Brush name="mark" toName="right"/>', "polygon": '<Polygon name="mark" toName="right"/>'}[kind]
    config = view(RIGHT, '<Labels name="what" toName="right"><Label value="Car" alias="c"/></Labels>', tag)
    value = {k: v for k, v in BOX["value"].items() if k != "rectanglelabels"}  # type: ignore[attr-defined]
    drawn = {**BOX, "id": "r", "to_name": "right", "from_name": "rect", "type": "rectangle", "value": value}
    label = {**drawn, "type": "labels", "from_name": "what", "value": {**value, "labels": ["c"]}}
    (results,) = predicted(api, model, config, {"two": data_uri(picture())}, drawn, label)
    pairs = [results[at : at + 2] for at in range(0, len(results), 2)]
    assert pairs
    for shape, said in pairs:
        assert shape["id"] == said["id"]
        assert (shape["type"], shape["from_name"]) == (kind, "mark")
        assert (said["type"], said["from_name"], said["value"].pop("labels")) == ("labels", "what", ["c"])
        assert said["value"] == shape["value"]
    (results,) = predicted(api, model, config, {"two": data_uri(picture())}, drawn)
    assert {result["type"] for result in results} == {kind}


def test_a_project_that_takes_no_masks_is_told_so_when_it_connects(api: Api, model: str) -> None:
    at = f"/label-studio/{model}/setup"
    for config in (CONFIG, POLYGONS, view(RIGHT, '<Brush name="b" toName="right"/>'), None, ""):
        assert api.http.post(at, json={"project": "1.1", "schema": config}).json() == {"model_version": model}
    assert api.http.post(at, json={}).status_code == 200
    for config in (
        view(RIGHT, '<RectangleLabels name="r" toName="right"><Label value="Car"/></RectangleLabels>'),
        view(RIGHT, BRUSHES[0]),  # for a picture that is not there
        view('<Text name="right" value="$two"/>', BRUSHES[1]),
        view(RIGHT),
        view(),
    ):
        problem = assert_problem(api.http.post(at, json={"project": "1.1", "schema": config}), 422, "invalid_request")
        for tag in ("BrushLabels", "PolygonLabels", "Image"):
            assert tag in problem["detail"]
    assert_problem(api.http.post(at, json={"schema": "<View>"}), 422, "invalid_request")
    assert_problem(api.http.post(at, json={"schema": 3}), 422, "invalid_request")


def test_thousands_of_tasks_without_anything_drawn(api: Api, model: str) -> None:
    body = asked("data:image/png;base64,AA==")
    body["tasks"] = 3000 * body["tasks"]
    answer = api.http.post(f"/label-studio/{model}/predict", json=body).raise_for_status().json()
    assert [each["result"] for each in answer["results"]] == 3000 * [[]]
    body["params"] = {"context": {"result": [POINT]}}
    assert_problem(api.http.post(f"/label-studio/{model}/predict", json=body), 422, "invalid_request")
