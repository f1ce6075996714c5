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

from tests.service.running import Api, assert_problem, best

# Serialised by osam 0.8.1's own request types.
OSAM: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "recorded" / "osam.json").read_text())["requests"]


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
