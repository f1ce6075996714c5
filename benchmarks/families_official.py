"""The official implementations of the families, each with the calls of segment-anything's predictor."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def _registered(package: str, kind: str) -> Callable[[State], Any]:
    """SAM's own package and those made from it."""

    def made(state: State) -> Any:
        module = importlib.import_module(package)
        return module.SamPredictor(_filled(module.sam_model_registry[kind](), state))

    return made


def _sam2(config: str) -> Callable[[State], Any]:
    def made(state: State) -> Any:
        build = importlib.import_module("sam2.build_sam").build_sam2
        predictor = importlib.import_module("sam2.sam2_image_predictor").SAM2ImagePredictor
        return predictor(_filled(build(f"configs/{config}.yaml", device="cpu"), state))

    return made


class _EfficientSam:
    """The official network has no predictor."""

    def __init__(self, state: State, width: int) -> None:
        build = importlib.import_module("efficient_sam.efficient_sam").build_efficient_sam
        self._model = _filled(build(encoder_patch_embed_dim=width, encoder_num_heads=width // 64), state)
        self._embedding, self._size = torch.empty(0), (0, 0)

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        self._size = (image.shape[0], image.shape[1])
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        self._embedding = self._model.get_image_embeddings(pixels)

    def get_image_embedding(self) -> Tensor:
        return self._embedding

    @torch.inference_mode()
    def predict(self, point_coords: np.ndarray, point_labels: np.ndarray, multimask_output: bool = True) -> Any:
        points, labels = torch.from_numpy(point_coords).float(), torch.from_numpy(point_labels).float()
        masks, iou = self._model.predict_masks(
            self._embedding, points[None, None], labels[None, None], multimask_output, *self._size, *self._size
        )
        return (masks[0, 0] >= 0).numpy(), iou[0, 0].numpy(), masks[0, 0]


def _filled(network: nn.Module, state: State) -> nn.Module:
    network.load_state_dict(state, strict=True)
    # TinyViT keeps its biases as they were when it was last switched to inference.
    return network.train().eval().requires_grad_(False)


OFFICIAL: dict[str, tuple[str, Callable[[State], Any]]] = {
    "sam_vit_b": ("segment_anything", _registered("segment_anything", "vit_b")),
    "sam_hq_vit_b": ("segment_anything_hq", _registered("segment_anything_hq", "vit_b")),
    "sam_hq_vit_tiny": ("segment_anything_hq", _registered("segment_anything_hq", "vit_tiny")),
    "sam2_hiera_tiny": ("sam2", _sam2("sam2/sam2_hiera_t")),
    "sam2.1_hiera_tiny": ("sam2", _sam2("sam2.1/sam2.1_hiera_t")),
    "sam2.1_hiera_base_plus": ("sam2", _sam2("sam2.1/sam2.1_hiera_b+")),
    "mobile_sam": ("mobile_sam", _registered("mobile_sam", "vit_t")),
    "efficient_sam_ti": ("efficient_sam", lambda state: _EfficientSam(state, 192)),
    "efficient_sam_s": ("efficient_sam", lambda state: _EfficientSam(state, 384)),
}
"""By variant: the package that has its network, and how it is made from a state dict."""


def predictor(variant: str, state: State) -> Any:
    """The official predictor on those weights. Raises ImportError where its package is missing."""
    with warnings.catch_warnings():
        # Deprecations and double registrations of their own.
        warnings.simplefilter("ignore")
        return OFFICIAL[variant][1](state)


def named(package: str) -> str:
    """The package with its version, as it is installed here."""
    try:
        distribution = packages_distributions()[package][0]
        return f"{distribution} {version(distribution)}"
    except (KeyError, PackageNotFoundError):  # a folder on PYTHONPATH
        return package
