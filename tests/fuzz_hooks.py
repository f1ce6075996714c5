"""For schemathesis: some requests name the model that is there and send a real picture, so that they go all the way."""

from __future__ import annotations

import base64
import os
import random
from typing import Any
from urllib.parse import unquote

import schemathesis

from tests.service.running import picture

_MODEL = os.environ["FUZZ_MODEL"]
_DEEP = os.environ["FUZZ_DEEP"] == "yes"
_PICTURE = picture(40, 30)
_DRAW = random.Random(0)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Keep the model from being deleted; in deep rounds, read it and segment a picture with it."""
    named = (case.path_parameters or {}).get("model_id")
    if case.method == "DELETE" and named is not None and unquote(str(named)) == _MODEL:
        case.path_parameters["model_id"] = "another"
    if not _DEEP or _DRAW.random() < 0.2:
        return
    if case.method == "GET" and named is not None:
        case.path_parameters["model_id"] = _MODEL
    if case.method == "POST" and case.path == "/segment" and isinstance(case.body, dict):
        form = case.media_type == "multipart/form-data"
        case.body["model"] = _MODEL
        case.body.pop("image_id", None)
        case.body["image"] = _PICTURE if form else base64.b64encode(_PICTURE).decode()
