"""The OpenAPI document against the service: what it takes is described, what is sent is declared, examples fit."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import pytest

from tests.models import TINY
from tests.service.running import Api, picture

PICTURE = picture()
IMAGE = base64.b64encode(PICTURE).decode()
LOGITS = np.linspace(-1, 1, (4 * TINY.grid) ** 2, dtype=np.float32).reshape(4 * TINY.grid, -1)
POINTS, BOX = [[30, 20], [5.5, 5]], [10, 10, 60, 50]
ONE = {"image": IMAGE, "points": [[30, 20]]}
FORM, PLAIN, JSON = "multipart/form-data", "application/x-www-form-urlencoded", "application/json"


def npy(logits: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, logits)
    return file.getvalue()


NPY = base64.b64encode(npy(LOGITS)).decode()


@pytest.fixture(scope="module")
def document(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = api.http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def image_id(api: Api, model: str) -> str:
    made = api.http.post("/embed", files={"image": PICTURE}, data={"model": model})
    return str(made.raise_for_status().json()["image_id"])


def fits(document: dict[str, Any], schema: dict[str, Any], value: Any) -> bool:
    """By the schema where it stands in the document, whose components it may name."""
    return jsonschema_rs.is_valid({**schema, "components": document["components"]}, value)


def taken(document: dict[str, Any], path: str, kind: str, value: Any) -> bool:
    return fits(document, document["paths"][path]["post"]["requestBody"]["content"][kind]["schema"], value)


ACCEPTED: dict[str, dict[str, Any]] = {
    "points": {"image": IMAGE, "points": POINTS, "point_labels": [1, 0]},
    "other names": {"image": IMAGE, "point_coords": POINTS, "labels": [1, 0], "bbox": BOX},
    "some other names": {"image": IMAGE, "points": POINTS, "labels": [1, 0], "multimask_output": True},
    "in a prompt": {"image": IMAGE, "prompts": [{"point_coords": POINTS, "labels": [1, 0]}, {"bbox": BOX}]},
    "in a picture": {"images": [{"image": IMAGE, "bbox": BOX}, {"image": IMAGE, "prompts": [{"bbox": BOX}]}]},
    "labels of corners": {"image": IMAGE, "points": [[5, 5], [60, 50]], "point_labels": [2, 3]},
    "nulls": {
        "image": IMAGE, "image_id": None, "images": None, "prompts": None, "points": None, "point_labels": None,
        "box": BOX, "mask_input": None,
    },
    "nulls by other names": {
        "image": IMAGE, "point_coords": None, "labels": None, "bbox": None, "prompts": [{"box": BOX, "labels": []}],
    },
    "rows": {**ONE, "mask_input": LOGITS.tolist()},
    "one of rows": {**ONE, "mask_input": LOGITS[None].tolist()},
    "npy": {**ONE, "mask_input": NPY},
    "data URI": {"image": f"data:image/png;base64,{IMAGE}", "box": BOX},
    **{form: {**ONE, "format": form} for form in ("rle", "png", "polygon", "geojson", "npy")},
}  # fmt: skip


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_accepted_as_json_is_described(
    api: Api, model: str, document: dict[str, Any], body: dict[str, Any]
) -> None:
    body = {"model": model, **body}
    assert taken(document, "/segment", JSON, body)
    response = api.http.post("/segment", json=body)
    assert response.status_code == 200, response.text
    schema = document["paths"]["/segment"]["post"]["responses"]["200"]["content"][JSON]["schema"]
    assert fits(document, schema, response.json())


FIELDS: dict[str, dict[str, str]] = {
    "points": {"points": json.dumps(POINTS), "point_labels": "[1, 0]"},
    "other names": {"point_coords": json.dumps(POINTS), "labels": "[1, 0]", "bbox": json.dumps(BOX)},
    "several": {"prompts": json.dumps([{"bbox": BOX}, {"labels": [1], "point_coords": [[3, 3]]}])},
    "nulls and nothing": {"points": "null", "labels": "", "mask_input": "null", "box": json.dumps(BOX)},
    "rows": {"points": "[[30, 20]]", "mask_input": json.dumps(LOGITS.tolist())},
    "one of rows": {"points": "[[30, 20]]", "mask_input": json.dumps(LOGITS[None].tolist())},
    "npy": {"points": "[[30, 20]]", "mask_input": NPY},
    **{f"{name} {word}": {"points": "[[30, 20]]", name: word}
       for name in ("multimask", "multimask_output") for word in ("true", "True", "1", "yes", "on", "OFF", "no", "0")},
    "geojson": {"points": "[[30, 20]]", "format": "geojson"},
}  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_what_is_accepted_as_a_form_is_described(
    api: Api, model: str, image_id: str, document: dict[str, Any], fields: dict[str, str]
) -> None:
    form = {"model": model, **fields}
    assert taken(document, "/segment", FORM, {**form, "image": "a file"})
    response = api.http.post("/segment", files={"image": PICTURE}, data=form)
    assert response.status_code == 200, response.text
    form["image_id"] = image_id
    for kind in (FORM, PLAIN):
        assert taken(document, "/segment", kind, form)
        as_files = {name: (None, value) for name, value in form.items()}
        response = api.http.post("/segment", **({"files": as_files} if kind == FORM else {"data": form}))
        assert response.request.headers["content-type"].startswith(kind)
        assert response.status_code == 200, response.text


def test_a_file_of_logits_in_a_form(api: Api, model: str, document: dict[str, Any]) -> None:
    assert taken(document, "/segment", FORM, {"model": model, "image": "a file", "mask_input": "a file", "bbox": "[]"})
    response = api.http.post(
        "/segment", files={"image": PICTURE, "mask_input": npy(LOGITS[None])}, data={"model": model, "bbox": str(BOX)}
    )
    assert response.status_code == 200, response.text


REFUSED: dict[str, dict[str, Any]] = {
    "unknown": {**ONE, "colour": "red"},
    "unknown in a prompt": {"image": IMAGE, "prompts": [{"box": BOX, "bboxes": BOX}]},
    "unknown in a picture": {"images": [{"image": IMAGE, "box": BOX, "multimask": True}]},
    "points twice": {**ONE, "point_coords": POINTS},
    "points twice, once null": {**ONE, "point_coords": None},
    "labels twice": {**ONE, "point_labels": [1], "labels": [1]},
    "a box twice": {"image": IMAGE, "box": BOX, "bbox": BOX},
    "multimask twice": {**ONE, "multimask": True, "multimask_output": True},
    "a box twice in a prompt": {"image": IMAGE, "prompts": [{"box": BOX, "bbox": BOX}]},
    "two of rows": {**ONE, "mask_input": [LOGITS.tolist()] * 2},
    "no rows": {**ONE, "mask_input": []},
    "a format of others": {**ONE, "format": "gif"},
    "null for a format": {**ONE, "format": None},
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_the_document_forbids_is_refused(
    api: Api, model: str, document: dict[str, Any], body: dict[str, Any]
) -> None:
    body = {"model": model, **body}
    assert not taken(document, "/segment", JSON, body)
    assert api.http.post("/segment", json=body).status_code == 422


@pytest.mark.parametrize("path", ["/segment", "/segment/everything", "/embed", "/compress", "/plan"])
def test_unknown_fields_of_forms_are_forbidden_and_refused(
    api: Api, model: str, document: dict[str, Any], path: str
) -> None:
    forms = document["paths"][path]["post"]["requestBody"]["content"]
    for kind in {FORM, PLAIN} & set(forms):
        known = (
            {"model": model, "image_id": "x"}
            if kind == PLAIN
            else dict.fromkeys(forms[kind]["schema"]["required"], "x")
        )
        assert taken(document, path, kind, known)
        assert not taken(document, path, kind, {**known, "colour": "red"})
        parts: Any = {"files": {"colour": (None, "red")}} if kind == FORM else {"data": {"colour": "red"}}
        assert api.http.post(path, **parts).status_code == 422


def test_every_known_field_of_a_form_is_described(api: Api, document: dict[str, Any]) -> None:
    """The service names the fields that it knows when it refuses another."""
    for path in ("/segment", "/segment/everything", "/embed", "/compress"):
        forms = document["paths"][path]["post"]["requestBody"]["content"]
        for kind in {FORM, PLAIN} & set(forms):
            parts: Any = {"files": {"colour": (None, "red")}} if kind == FORM else {"data": {"colour": "red"}}
            known = api.http.post(path, **parts).json()["detail"].partition("known are ")[2].split(", ")
            assert known == sorted(forms[kind]["schema"]["properties"]), (path, kind)


def schemas(node: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in the document, with where it stands."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "schema":
                yield from _within(value, f"{at}/{key}")
            elif key == "schemas":
                for name, each in value.items():
                    yield from _within(each, f"{at}/{key}/{name}")
            else:
                yield from schemas(value, f"{at}/{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from schemas(value, f"{at}/{number}")


def _within(schema: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    yield at, schema
    for key in ("items", "additionalProperties", "not"):
        yield from _within(schema.get(key), f"{at}/{key}")
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for number, each in enumerate(schema.get(key, [])):
            yield from _within(each, f"{at}/{key}/{number}")
    for name, each in schema.get("properties", {}).items():
        yield from _within(each, f"{at}/properties/{name}")


def test_schemas_are_schemas_and_their_examples_fit(document: dict[str, Any]) -> None:
    seen = 0
    for at, schema in schemas(document):
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
        assert "example" not in schema, f"{at}: OpenAPI 3.1 knows examples"
        for value in [*schema.get("examples", []), *([schema["default"]] if "default" in schema else [])]:
            assert fits(document, schema, value), (at, value)
            seen += 1
    assert seen > 30


def label_studio(model: str, *regions: dict[str, Any]) -> dict[str, Any]:
    tasks = [{"id": 7, "data": {"image": f"data:image/png;base64,{IMAGE}"}, "annotations": []}]
    return {"tasks": tasks, "project": "1.2", "label_config": None, "params": {"context": {"result": list(regions)}}}


SIZES = {"original_width": 96, "original_height": 64, "image_rotation": 0, "from_name": "a", "to_name": "image"}
POINT = {**SIZES, "type": "keypointlabels", "is_positive": 1,
         "value": {"x": 30.0, "y": 40.0, "width": 0.3, "keypointlabels": ["Car"]}}  # fmt: skip
RECTANGLE = {**SIZES, "type": "rectanglelabels",
             "value": {"x": 10, "y": 10, "width": 50, "height": 40, "rectanglelabels": ["Car"]}}  # fmt: skip
RELATION = {"type": "relation", "from_id": "a", "to_id": "b"}


def test_label_studios_fields_are_described(api: Api, model: str, document: dict[str, Any]) -> None:
    for path in ("/predict", "/label-studio/{model_id}/predict"):
        operation = document["paths"][path]["post"]
        asked = operation["requestBody"]["content"][JSON]["schema"]
        assert set(asked["properties"]) == {"tasks", "label_config", "params"}
        for wrong in ({}, {"tasks": 1}, {"tasks": [1]}, {"tasks": [], "params": {"context": {"result": [1]}}}):
            assert not fits(document, asked, wrong)
            assert api.http.post(path.format(model_id=model), json=wrong).status_code == 422
        body = label_studio(model, POINT, RECTANGLE, RELATION)
        assert fits(document, asked, body)
    answer = api.http.post(f"/label-studio/{model}/predict", json=body).raise_for_status().json()
    told = operation["responses"]["200"]["content"][JSON]["schema"]
    assert fits(document, told, answer)
    (brush,) = answer["results"][0]["result"]
    described = document["components"]["schemas"]["Prediction"]["properties"]["result"]["items"]["properties"]
    assert set(described) - set(brush) == {"item_index"}  # where an Image tag has a list
    brush["type"] = "rectanglelabels"
    assert not fits(document, told, answer)


def test_every_answer_is_of_a_declared_type(api: Api, model: str, image_id: str, document: dict[str, Any]) -> None:
    """Each operation, asked until all that the document declares of its 2xx answers was seen."""
    seen: dict[tuple[str, str], set[tuple[str, str]]] = {}

    def ask(method: str, path: str, at: str | None = None, **more: Any) -> httpx.Response:
        response = api.http.request(method, at or path, **more)
        answers = document["paths"][path][method.lower()]["responses"]
        status = str(response.status_code)
        told = answers.get(status) or answers[f"{status[0]}XX"]
        kind = response.headers.get("content-type", "").partition(";")[0]
        assert kind in told.get("content", {"": None}), (method, path, status, kind)
        seen.setdefault((method, path), set()).add((status, kind))
        return response

    one = {"model": model, **ONE}
    for accept in (JSON, "image/png", "application/geo+json"):
        ask("POST", "/segment", json=one, headers={"Accept": accept})
    assert ask("POST", "/segment", json={**one, "multimask": True}, headers={"Accept": "image/png"}).status_code == 406
    many = {"model": model, "images": [ONE]}
    assert ask("POST", "/segment", json=many, headers={"Accept": "application/geo+json"}).status_code == 406
    everything = {"model": model, "image_id": image_id, "points_per_side": 1}
    for accept in (JSON, "application/geo+json"):
        ask("POST", "/segment/everything", json=everything, headers={"Accept": accept})
    ask("POST", "/embed", json={"model": model, "image": IMAGE})
    prompt = {"points": [[30, 20]], "point_labels": [1]}
    ask("POST", "/api/generate", json={"model": model, "image": IMAGE, "prompt": prompt})
    for path in ("/health", "/label-studio/{model_id}/health"):
        ask("GET", path, path.format(model_id=model))
    for path in ("/predict", "/setup"):
        assert ask("POST", path, json=label_studio(model, POINT)).status_code == 404  # no model is the default here
        ask(
            "POST", f"/label-studio/{{model_id}}{path}", f"/label-studio/{model}{path}", json=label_studio(model, POINT)
        )
    for path in ("/variants", "/healthz", "/readyz", "/metrics", "/models", "/jobs"):
        ask("GET", path)
    ask("GET", "/models/{model_id}", f"/models/{model}")
    at = f"/models/{model}/artifact"
    whole = ask("GET", "/models/{model_id}/artifact", at)
    ask("HEAD", "/models/{model_id}/artifact", at)
    ask("HEAD", "/models/{model_id}/artifact", at, headers={"If-None-Match": whole.headers["etag"]})
    for more, status in (
        ({"If-None-Match": whole.headers["etag"]}, 304), ({"Range": "bytes=0-9"}, 206),
        ({"Range": "bytes=0-9,20-29"}, 206), ({"Range": f"bytes={10**12}-"}, 416), ({"Range": "bytes=9-1"}, 200),
        ({"Range": "lines=1-2"}, 200),
    ):  # fmt: skip
        part = ask("GET", "/models/{model_id}/artifact", at, headers=more)
        assert part.status_code == status, more
        if status == 416:
            assert part.headers["content-range"] == f"bytes */{len(whole.content)}"
    source = api.http.get(f"/models/{model}").json()["source_sha256"]
    asked = {"source": {"upload": source}, "codec": "lattice", "policy": "equal_error", "fidelity": False}
    for path, name in (("/compress", "declared"), ("/plan", "declared-plan")):
        job = ask("POST", path, json={**asked, "name": name}).raise_for_status().json()["id"]
        ask("GET", "/jobs/{job_id}", f"/jobs/{job}")
        events = ask("GET", "/jobs/{job_id}/events", f"/jobs/{job}/events")
        blocks = [block for block in events.text.replace("\r", "").split("\n\n") if block and block[0] != ":"]
        each = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]
        event = document["paths"]["/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]
        data = event["schema"]["properties"]["data"]["contentSchema"]
        assert each
        assert all(fits(document, event["schema"], e) and fits(document, data, json.loads(e["data"])) for e in each)
        last = each[-1]["id"]
        ask("GET", "/jobs/{job_id}/events", f"/jobs/{job}/events", headers={"Last-Event-ID": last})
        ask("DELETE", "/jobs/{job_id}", f"/jobs/{job}")
    ask("DELETE", "/models/{model_id}", "/models/declared")
    unseen = {
        (method, path, status, kind)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        for status, told in operation["responses"].items()
        for kind in told.get("content", {"": None})
        if status[0] in "23" and (status, kind) not in seen.get((method.upper(), path), ())
    }
    assert unseen == {
        # A job that still runs is not forgotten but cancelled, and the brush needs a default model.
        ("delete", "/jobs/{job_id}", "200", JSON),
        ("post", "/predict", "200", JSON), ("post", "/setup", "200", JSON),
    }  # fmt: skip


def test_head_is_answered_where_it_is_allowed_and_as_get_is(api: Api, model: str, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        response = api.http.head(path.format(model_id=model, job_id="none"))
        if "head" in operations:
            get = api.http.get(path.format(model_id=model))
            assert (response.status_code, response.content) == (200, b"")
            for name in ("content-type", "content-length", "etag", "accept-ranges"):
                assert response.headers[name] == get.headers[name]
            continue
        assert (response.status_code == 405) is ("head" not in operations), path
        assert response.headers["allow"] == ", ".join(sorted(method.upper() for method in operations)), path
        assert response.content == b""
    for path in ("/", "/openapi.json", "/static/page.js"):
        head, get = api.http.head(path), api.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-type", "content-length", "content-security-policy"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)
