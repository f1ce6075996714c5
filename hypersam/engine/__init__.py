"""Models that stay in memory and answer prompts for many callers.

A request's way: its picture is taken apart on a thread (``engine``), the model is found or loaded (``residency``), the
embedding is found (``cache``), awaited (``flights``) or made in a batch, and prompts are decoded together, both on the
one thread that runs networks (``device``); full-size masks are made on a thread again (``decoding``).
"""

from hypersam.engine.decoding import predict
from hypersam.engine.engine import Engine, Picture
from hypersam.engine.everything import Everything, Found, Grid
from hypersam.engine.prompts import (
    Mask,
    ModelFile,
    Prompt,
    Segmentation,
    bounding_box,
    check_prompts,
    check_suits,
    image_id_of,
)

__all__ = [
    "Engine", "Everything", "Found", "Grid", "Mask", "ModelFile", "Picture", "Prompt", "Segmentation",
    "bounding_box", "check_prompts", "check_suits", "image_id_of", "predict",
]  # fmt: skip
