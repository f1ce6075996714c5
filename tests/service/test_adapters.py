"""Other servers' protocols, from what their clients really send."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersam.images import from_rle
from service.label_studio.brush_rle import pack
from tests.service.running import Api, assert_problem, picture

# Serialised by osam 0.8.1's own request types.
OSAM: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "recorded" / "osam.json").read_text())["requests"]


def best(api: Api, model: str, image: bytes, **prompt: Any) -> tuple[np.ndarray, float]:
    body = {"model": model, "image": base64.b64encode(image).decode(), "multimask": True, **prompt}
    mask = api.http.post("/segment", json=body).raise_for_status().json()["masks"][0]
    return from_rle(mask["segmentation"]), mask["score"]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("point", {"points": [[30, 20]]}),
        ("box", {"points": [[30, 20]], "box": [10, 10, 60, 50]}),
        ("no_prompt", {"points": [[48, 32]]}),
    ],
)
def test_osams_clients_get_the_best_mask(api: Api, model: str, name: str, prompt: dict[str, Any]) -> None:
    request = OSAM[name]
    response = api.http.post("/api/generate", json=request)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert set(answer) == {"model", "image_embedding", "annotations"}
    assert answer["model"] == request["model"]
    (annotation,) = answer["annotations"]
    assert set(annotation) == {"bounding_box", "text", "score", "mask"}
    cut = np.asarray(Image.open(io.BytesIO(base64.b64decode(annotation["mask"])))).astype(bool)
    box = annotation["bounding_box"]
    # osam's Annotation refuses a mask of any other shape.
    assert cut.shape == (box["ymax"] - box["ymin"] + 1, box["xmax"] - box["xmin"] + 1)
    whole = np.zeros((64, 96), bool)
    whole[box["ymin"] : box["ymax"] + 1, box["xmin"] : box["xmax"] + 1] = cut
    wanted, score = best(api, model, base64.b64decode(request["image"]), **prompt)
    assert np.array_equal(whole, wanted)
    assert annotation["score"] == pytest.approx(score, abs=1e-5)


def test_what_osam_could_and_this_cannot(api: Api, model: str) -> None:
    image = OSAM["point"]["image"]
    for body, says in (
        ({"model": model, "image": image, "prompt": {"texts": ["a cat"]}}, "points"),
        ({"model": model, "image_embedding": {"original_height": 1}}, "image"),
        ({"model": model}, "image"),
        ({"model": model, "image": image, "prompt": {"points": [[1, 1]], "point_labels": [4]}}, "point_labels"),
        ({"model": model, "image": image, "prompt": {"points": [[1, 1, 1]], "point_labels": [1]}}, "points"),
        ({"model": model, "image": image, "prompt": {"points": [[999, 1]], "point_labels": [1]}}, "outside"),
        ({"model": model, "image": image, "prompt": {"points": [[1, 1]] * 2000, "point_labels": [1] * 2000}}, "1024"),
    ):
        response = api.http.post("/api/generate", json=body)
        assert response.status_code == 422, response.text
        assert says in response.json()["detail"]
    assert_problem(api.http.post("/api/generate", json={**OSAM["point"], "model": "sam2:large"}), 404, "unknown_model")


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
