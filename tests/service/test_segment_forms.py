"""What /segment, /segment/everything and /embed take and give beyond one click on one picture."""

from __future__ import annotations

import base64
import io
import json
import time
from itertools import pairwise
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from pydantic import AliasChoices

from hypersam.images import from_rle, to_npy
from service.images import decode_logits
from service.prompt_schemas import SegmentRequest
from tests.models import TINY
from tests.service.running import Api, assert_problem, picture

CLICK = {"points": [[30, 20]], "point_labels": [1]}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def post(api: Api, **body: Any) -> httpx.Response:
    return api.http.post("/segment", json=body)


def masks(api: Api, model: str, **body: Any) -> list[np.ndarray]:
    response = post(api, model=model, **body)
    assert response.status_code == 200, response.text
    return [from_rle(mask["segmentation"]) for mask in response.json()["masks"]]


def test_aliases_mean_the_same(api: Api, model: str) -> None:
    image = b64(picture())
    points, labels, box = [[30, 20], [5, 5]], [1, 0], [10, 10, 60, 50]
    wanted = masks(api, model, image=image, prompts=[{"points": points, "point_labels": labels, "box": box}])
    for prompt in (
        {"point_coords": points, "labels": labels, "bbox": box},
        {"points": points, "labels": labels, "bbox": box},
        {"points": [*points, [10, 10], [60, 50]], "point_labels": [1, 0, 2, 3]},  # osam's corners
        {"points": [*points, [1, 1], [60, 50], [10, 10]], "point_labels": [1, 0, -1, 3, 2]},
        {"points": points, "labels": labels, "box": box, "mask_input": None},
    ):
        assert np.array_equal(masks(api, model, image=image, prompts=[prompt])[0], wanted[0]), prompt
        assert np.array_equal(masks(api, model, image=image, **prompt)[0], wanted[0]), prompt  # beside the picture
        fields = {name: json.dumps(value) for name, value in prompt.items()}
        form = api.http.post("/segment", files={"image": picture()}, data={"model": model, **fields}).json()
        assert np.array_equal(from_rle(form["masks"][0]["segmentation"]), wanted[0]), prompt
    assert len(masks(api, model, image=image, multimask_output=True, **CLICK)) == 3
    (alone,) = masks(api, model, image=image, box=box)
    for nothing in ([], None):
        prompt = {"point_coords": nothing, "point_labels": nothing, "bbox": box}
        assert np.array_equal(masks(api, model, image=image, **prompt)[0], alone)
        fields = {name: json.dumps(value) for name, value in prompt.items()}
        form = api.http.post("/segment", files={"image": picture()}, data={"model": model, **fields}).json()
        assert np.array_equal(from_rle(form["masks"][0]["segmentation"]), alone)


def test_base64_with_line_breaks(api: Api, model: str) -> None:
    (wanted,) = masks(api, model, image=b64(picture()), **CLICK)
    for image in (base64.encodebytes(picture()).decode(), "data:image/png;base64,\r\n" + b64(picture()) + "\r\n"):
        assert np.array_equal(masks(api, model, image=image, **CLICK)[0], wanted)


@pytest.mark.parametrize(
    "prompt",
    [
        {"points": [[30, 20]], "labels": [0]},  # what is not wanted, alone
        {"points": [[0, 0], [96, 64]], "labels": [1, 1]},
        {"points": [[95.99, 0.25]], "box": [0, 0, 96, 64]},
        {"box": [12.25, 3.5, 12.75, 63.125]},
    ],
)
def test_what_is_said_of_a_mask_is_true_of_it(api: Api, model: str, prompt: dict[str, Any]) -> None:
    response = post(api, model=model, image=b64(picture()), multimask=True, **prompt)
    assert response.status_code == 200, response.text
    found = response.json()["masks"]
    assert len(found) == 3
    for mask in found:
        rle = mask["segmentation"]
        assert rle["size"] == [64, 96]
        assert mask["area"] == coco.area(rle) == from_rle(rle).sum()
        assert mask["bbox"] == coco.toBbox(rle).tolist()


def test_several_prompts_in_a_form(api: Api, model: str) -> None:
    prompts = [CLICK, {"box": [0, 0, 50, 50]}]
    form = api.http.post(
        "/segment", files={"image": picture()}, data={"model": model, "prompts": json.dumps(prompts)}
    ).json()
    as_json = post(api, model=model, image=b64(picture()), prompts=prompts).json()
    assert form["masks"] == as_json["masks"]
    assert [m["prompt"] for m in form["masks"]] == [0, 1]


def test_several_pictures(api: Api, model: str) -> None:
    pictures = [picture(96, 64, seed=s) for s in (21, 22, 23)]
    alone = [masks(api, model, image=b64(p), **CLICK)[0] for p in pictures]
    known = post(api, model=model, image=b64(pictures[0]), **CLICK).json()["image_id"]
    images: list[dict[str, Any]] = [
        {"image_id": known, **CLICK},
        {"image": b64(pictures[1]), "prompts": [CLICK, {"box": [1, 1, 30, 30]}]},
        {"image": b64(pictures[2]), **CLICK},
    ]
    response = post(api, model=model, images=images)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [len(one["masks"]) for one in answer["images"]] == [1, 2, 1]
    assert answer["images"][0]["image_id"] == known
    for one, wanted in zip(answer["images"], alone, strict=True):
        assert (from_rle(one["masks"][0]["segmentation"]) != wanted).mean() < 1e-2
    images[1]["image_id"] = images[1].pop("image") and "0" * 32
    problem = assert_problem(post(api, model=model, images=images), 404, "unknown_image")
    assert problem["errors"][0]["loc"] == ["images", "1", "image_id"]
    images[1] = {"image": b64(pictures[1]), "box": [0, 0, 5000, 10]}
    problem = assert_problem(post(api, model=model, images=images), 422, "bad_prompt")
    assert problem["errors"][0]["loc"] == ["images", "1", "prompts", "0", "box"]
    assert_problem(post(api, model=model, images=images * 10), 422, "invalid_request")
    assert_problem(post(api, model=model, images=images, **CLICK), 422, "invalid_request")


def test_polygons_and_geojson_give_the_mask_again(api: Api, model: str) -> None:
    image = b64(picture(seed=5))
    prompt = {"box": [4, 4, 90, 60]}
    (wanted,) = masks(api, model, image=image, prompts=[prompt])
    body = post(api, model=model, image=image, prompts=[prompt], format="geojson").json()
    geometry = body["masks"][0]["segmentation"]
    assert geometry["type"] == "MultiPolygon"
    assert np.array_equal(filled(geometry["coordinates"], wanted.shape), wanted)
    whole = api.http.post(
        "/segment", json={"model": model, "image": image, "prompts": [prompt]},
        headers={"Accept": "application/geo+json"},
    )  # fmt: skip
    assert whole.headers["content-type"] == "application/geo+json"
    collection = whole.json()
    assert collection["type"] == "FeatureCollection"
    assert collection["features"][0]["geometry"] == geometry
    assert collection["features"][0]["properties"]["area"] == int(wanted.sum())
    answer = post(api, model=model, image=image, prompts=[prompt], format="polygon").json()
    polygons = answer["masks"][0]["segmentation"]
    outer = [[value for point in rings[0][:-1] for value in point] for rings in geometry["coordinates"]]
    assert polygons == outer
    rles = coco.frPyObjects(polygons, *wanted.shape)  # pycocotools takes them as they are
    assert len(rles) == len(polygons)


def filled(polygons: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """By even and odd crossings of a ray from each pixel's centre."""
    ys, xs = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = np.zeros(shape, bool)
    for rings in polygons:
        for ring in rings:
            for (x0, y0), (x1, y1) in pairwise(ring):
                if y0 != y1:
                    crosses = (ys >= min(y0, y1)) & (ys < max(y0, y1))
                    inside ^= crosses & (xs < x0 + (ys - y0) * (x1 - x0) / (y1 - y0))
    return inside


def test_logits_come_back_as_a_mask_input(api: Api, model: str) -> None:
    image = b64(picture())
    first = post(api, model=model, image=image, format="npy", **CLICK).json()["masks"][0]
    logits = np.load(io.BytesIO(base64.b64decode(first["segmentation"])))
    side = 4 * TINY.grid
    assert (logits.shape, logits.dtype) == ((side, side), np.float32)
    as_npy = post(api, model=model, image=image, mask_input=first["segmentation"], **CLICK).json()["masks"]
    as_rows = post(api, model=model, image=image, mask_input=logits.tolist(), **CLICK).json()["masks"]
    assert as_npy == as_rows
    form = api.http.post(
        "/segment", files={"image": picture()},
        data={"model": model, "points": "[[30, 20]]", "mask_input": first["segmentation"]},
    ).json()  # fmt: skip
    assert form["masks"] == as_npy
    for three in (b64(to_npy(logits[None])), logits[None].tolist()):
        assert post(api, model=model, image=image, mask_input=three, **CLICK).json()["masks"] == as_npy
    # A larger model's rows of digits take more than the megabyte that other fields may have.
    rows = json.dumps(logits.tolist()) + " " * (1 << 20)
    for part in ((None, rows), ("a.npy", to_npy(logits)), ("a.npy", to_npy(logits[None]))):
        files: Any = {"image": picture(), "mask_input": part}
        form = api.http.post("/segment", files=files, data={"model": model, "points": "[[30, 20]]"})
        assert form.status_code == 200, form.text
        assert form.json()["masks"] == as_npy


def npy(array: np.ndarray) -> str:
    out = io.BytesIO()
    np.save(out, array)
    return b64(out.getvalue())


def huge() -> str:
    """A header that announces eighty petabytes."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99999999), }".ljust(117) + b"\n"
    return b64(b"\x93NUMPY\x01\x00v\x00" + header)


def headed(header: str, *, version: bytes = b"\x01\x00") -> str:
    """A .npy file of such a header and one number."""
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b64(b"\x93NUMPY" + version + length + header.encode("latin-1") + bytes(4))


ODD_HEADERS = (
    "(" * 128, "[" * 900, "-" * 1000, "{" * 900, "9" * 1000, "1+" * 400 + "1j", "'" * 99, "\\", "\0" * 99, "\xff", "",
    "{'descr':'<f4','fortran_order':False,'shape':(1," + "9" * 900 + ")}",
    "{'descr':'<f4','fortran_order':False,'shape':(True,1)}", "{'descr':'<f4','fortran_order':False,'shape':(-1,-1)}",
    "{'descr':'|O','fortran_order':False,'shape':(1,1)}", "{'descr':'<f16','fortran_order':False,'shape':(1,1)}",
    "{'descr':[('a','<f4')],'fortran_order':False,'shape':(1,1)}", "{'descr':'<f4','fortran_order':1,'shape':(1,1)}",
    "{'descr':'<f4','fortran_order':False,'shape':(1,1)}" + " " * 2000, "{'descr':'<f4','fortran_order':False}",
    "{'descr':'<f4','fortran_order':False,'shape':(1,1),'more':1}", "[]", "{}",
)  # fmt: skip


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x04\x00"], ids=lambda v: str(v[0]))
def test_headers_of_logits_that_nobody_writes(version: bytes) -> None:
    for header in ODD_HEADERS:
        with pytest.raises(ValueError, match=r"^its? "):
            decode_logits(headed(header, version=version))
    fine = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1), }  \n"
    if version[0] < 4:
        assert decode_logits(headed(fine, version=version)).tolist() == [[0.0]]
    whole = base64.b64decode(headed(fine, version=version))
    for cut in range(len(whole)):
        with pytest.raises(ValueError, match=r"^its? "):
            decode_logits(b64(whole[:cut]))


@pytest.mark.parametrize("header", ODD_HEADERS[:3])
def test_such_headers_are_bad_prompts(api: Api, model: str, header: str) -> None:
    given = headed(header)
    assert_problem(post(api, model=model, image=b64(picture()), mask_input=given, **CLICK), 422, "bad_prompt")
    files: Any = {"image": picture(), "mask_input": ("a.npy", base64.b64decode(given))}
    form = api.http.post("/segment", files=files, data={"model": model, "points": "[[30, 20]]"})
    assert_problem(form, 422, "bad_prompt")


@pytest.mark.parametrize("kind", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_logits_of_every_type_and_order(kind: str, order: Literal["C", "F"]) -> None:
    values = np.arange(-6, 6).reshape(3, 4) / 4
    assert decode_logits(npy(np.array(values, kind, order=order))).tolist() == values.tolist()
    for bad in (np.inf, -np.inf, np.nan, *((1e7, 1e300)[: "248".index(kind[2])])):
        with pytest.raises(ValueError, match="finite"):
            decode_logits(npy(np.full((2, 2), bad, kind)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("%%%", "base64"),
        (b64(b"hello"), ".npy"),
        (npy(np.zeros((3, 3, 3))), "shape"),
        (npy(np.zeros((1025, 2), np.float32)), "shape"),
        (npy(np.zeros((2, 2), np.int64)), "floating"),
        (npy(np.full((2, 2), np.nan)), "finite"),
        (npy(np.full((2, 2), 1e9)), "finite"),
        (npy(np.zeros((2, 2), np.float32))[:-8], "bytes"),
        (huge(), "shape"),
        (npy(np.zeros((2, 2), np.float32)), "logits"),
    ],
)
def test_bad_logits(api: Api, model: str, given: str, says: str) -> None:
    problem = assert_problem(post(api, model=model, image=b64(picture()), mask_input=given, **CLICK), 422, "bad_prompt")
    assert says in problem["detail"]
    assert problem["errors"][0]["loc"] == ["prompts", "0", "mask_input"]


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"points": [[500, 3]], "point_labels": [1]}, ["prompts", "0", "points"]),
        ({"points": [[5, 3]], "point_labels": [1, 1]}, ["prompts", "0", "point_labels"]),
        ({"points": [[5, 3]], "point_labels": [2]}, ["prompts", "0", "point_labels"]),
        ({"points": [[5, 3], [9, 9]], "point_labels": [2, 3], "box": [1, 1, 5, 5]}, ["prompts", "0", "point_labels"]),
        ({"points": [[5, 3]], "point_labels": [7]}, ["point_labels", "0"]),
        ({"box": [5, 5, 1, 1]}, ["prompts", "0", "box"]),
        ({"box": [1, 2, 3]}, ["box", "3"]),
        ({"prompts": [CLICK, {"box": [0, 0, 9000, 9]}]}, ["prompts", "1", "box"]),
        ({"prompts": [CLICK, {}]}, ["prompts", "1"]),
        ({"points": [[5, 3]], "point_coords": [[5, 3]]}, ["point_coords"]),
        ({**CLICK, "format": "gif"}, ["format"]),
        ({**CLICK, "colour": 1}, ["colour"]),
    ],
)
def test_bad_fields_are_named(api: Api, model: str, fields: dict[str, Any], loc: list[str]) -> None:
    response = post(api, model=model, image=b64(picture()), **fields)
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["loc"] == loc


def test_everything(api: Api, model: str) -> None:
    loose = {"points_per_side": 4, "pred_iou_thresh": -10, "stability_score_thresh": 0, "box_nms_thresh": 1}
    response = api.http.post("/segment/everything", json={"model": model, "image": b64(picture()), **loose})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["width"], answer["height"]) == (96, 64)
    scores = [mask["score"] for mask in answer["masks"]]
    assert len(scores) == 48
    assert scores == sorted(scores, reverse=True)
    for mask in answer["masks"][:5]:
        assert int(from_rle(mask["segmentation"]).sum()) == mask["area"]
    strict = {**loose, "pred_iou_thresh": scores[10]}
    form = {name: str(value) for name, value in strict.items()}
    few = api.http.post("/segment/everything", files={"image": picture()}, data={"model": model, **form}).json()
    assert [mask["score"] for mask in few["masks"]] == scores[:10]
    by_id = api.http.post(
        "/segment/everything", json={"model": model, "image_id": answer["image_id"], **strict, "format": "geojson"}
    ).json()
    assert [mask["segmentation"]["type"] for mask in by_id["masks"]] == ["MultiPolygon"] * 10
    collection = api.http.post(
        "/segment/everything", json={"model": model, "image_id": answer["image_id"], **strict},
        headers={"Accept": "image/png, application/geo+json"},
    )  # fmt: skip
    assert collection.headers["content-type"] == "application/geo+json"
    assert collection.json()["type"] == "FeatureCollection"
    for feature, mask in zip(collection.json()["features"], by_id["masks"], strict=True):
        assert feature["geometry"] == mask.pop("segmentation")
        assert feature == {"type": "Feature", "geometry": feature["geometry"], "properties": mask}
    for bad, loc in (({"points_per_side": 0}, "points_per_side"), ({"points_per_side": 999}, "points_per_side"),
                     ({"box_nms_thresh": 2}, "box_nms_thresh"), ({"format": "npy"}, "format")):  # fmt: skip
        problem = assert_problem(
            api.http.post("/segment/everything", json={"model": model, "image_id": "x", **bad}), 422, "invalid_request"
        )
        assert loc in problem["detail"]


def test_an_embedding_made_ahead(api: Api, model: str) -> None:
    image = picture(seed=1234)
    made = api.http.post("/embed", files={"image": image}, data={"model": model}).json()
    assert (made["cached"], made["width"], made["height"]) == (False, 96, 64)
    again = api.http.post("/embed", json={"model": model, "image": b64(image)}).json()
    assert (again["cached"], again["image_id"]) == (True, made["image_id"])
    answer = post(api, model=model, image_id=made["image_id"], **CLICK).json()
    assert answer["cached"] is True
    # Without a file, clients' libraries send a form in the other coding.
    plain = {"model": model, "image_id": made["image_id"]}
    form = api.http.post("/segment", data={**plain, "points": "[[30, 20]]", "labels": "[1]"})
    assert form.request.headers["content-type"] == "application/x-www-form-urlencoded"
    assert form.json()["masks"] == answer["masks"]
    loose = {"points_per_side": "2", "pred_iou_thresh": "-10", "stability_score_thresh": "0", "box_nms_thresh": "1"}
    assert len(api.http.post("/segment/everything", data={**plain, **loose}).json()["masks"]) == 12
    for bad in ({**plain, "colour": "red"}, {**plain, "model": ["a", "b"]}, {"model": model, "image": "x"}):
        assert_problem(api.http.post("/segment", data=bad), 422, "invalid_request")
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    as_json = api.http.post("/segment", content=json.dumps({**plain, **CLICK}), headers=kind)
    assert "application/json" in assert_problem(as_json, 415, "unsupported_media_type")["detail"]
    assert_problem(api.http.post("/segment", content=b"model=%ff", headers=kind), 422, "invalid_request")
    assert_problem(api.http.post("/embed", files={"model": (None, model)}), 422, "invalid_request")


def test_requests_have_ids(api: Api) -> None:
    given = api.http.get("/healthz", headers={"X-Request-ID": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    made = [api.http.get("/models/none").headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2
    odd = api.http.get("/healthz", headers={"X-Request-ID": "a b c"}).headers["x-request-id"]
    assert len(odd) == 32


def test_openapi_describes_the_bodies(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    for path in ("/segment", "/segment/everything", "/embed", "/api/generate", "/predict"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"]["type"] == "object"
    assert "$ref" not in json.dumps(document["paths"]["/segment"]["post"]["requestBody"])
    everything = document["paths"]["/segment/everything"]["post"]["requestBody"]["content"]
    for content in everything.values():
        assert content["schema"]["properties"]["format"]["enum"] == ["rle", "png", "polygon", "geojson"]
    segment = document["paths"]["/segment"]["post"]
    said = segment["requestBody"]["content"]["application/json"]["schema"]["properties"]
    for name, field in SegmentRequest.model_fields.items():
        if isinstance(field.validation_alias, AliasChoices):
            others = {str(choice) for choice in field.validation_alias.choices} - {name}
            assert all(f"also as {other}" in said[name]["description"] for other in others), name
    assert segment["responses"]["5XX"]["headers"]["Retry-After"]["schema"]["type"] == "integer"
    assert "errors" in document["components"]["schemas"]["Problem"]["properties"]


def test_who_hangs_up_is_let_go(api: Api, model: str) -> None:
    """A client that leaves in the middle of a long request gives its place back."""
    body = {"model": model, "image": b64(picture(500, 400, seed=9)), "points_per_side": 64, "pred_iou_thresh": -10}
    with pytest.raises(httpx.ReadTimeout):
        api.http.post("/segment/everything", json=body, timeout=0.5)
    deadline = time.monotonic() + 20
    while "hypersam_abandoned_requests_total 0.0" in (text := api.http.get("/metrics").text):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    assert "hypersam_requests_inside 0.0" in text


def test_a_drawing_of_rings_is_given_with_its_holes() -> None:
    from hypersam.images import to_polygons

    drawing = Image.new("1", (60, 50))
    draw = ImageDraw.Draw(drawing)
    draw.ellipse((3, 3, 40, 40), fill=1)
    draw.ellipse((12, 12, 30, 30), fill=0)
    draw.rectangle((18, 18, 22, 22), fill=1)
    draw.rectangle((50, 40, 59, 49), fill=1)
    mask = np.asarray(drawing)
    polygons = to_polygons(mask)
    assert sorted(len(rings) for rings in polygons) == [1, 1, 2]
    assert np.array_equal(filled(polygons, mask.shape), mask)
    for rings in polygons:
        for number, ring in enumerate(rings):
            assert ring[0] == ring[-1]
            area = sum(a[0] * b[1] - b[0] * a[1] for a, b in pairwise(ring)) / 2
            assert (area > 0) is (number == 0)
    assert to_polygons(np.zeros((4, 4), bool)) == []
