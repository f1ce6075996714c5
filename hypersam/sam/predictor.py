"""The calls of segment-anything's SamPredictor, so that a notebook or an annotation tool swaps one line."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypersam.errors import PromptError
from hypersam.sam.model import Embedding, SamModel


class SamPredictor:
    """Masks for prompts on one picture at a time, with the signatures of segment-anything 1.0.

    >>> predictor = hypersam.load("sam_vit_b.hsam")
    >>> predictor.set_image(image)
    >>> masks, scores, logits = predictor.predict(point_coords=np.array([[500, 375]]), point_labels=np.array([1]))
    """

    mask_threshold = 0.0

    def __init__(self, model: SamModel) -> None:
        self.model = model
        self._embedding: Embedding | None = None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @property
    def is_image_set(self) -> bool:
        """Whether ``set_image`` was called since the last reset."""
        return self._embedding is not None

    @property
    def embedding(self) -> Embedding:
        """The embedding of the picture that was set. Raises RuntimeError before ``set_image``."""
        if self._embedding is None:
            raise RuntimeError("An image must be set with .set_image(...) before mask prediction.")
        return self._embedding

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the picture as sent."""
        return self.embedding.original_size

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the picture in the model's input."""
        return self.embedding.input_size

    def set_image(self, image: NDArray[np.uint8], image_format: str = "RGB") -> None:
        """Embed a picture (uint8, H x W x 3); ``image_format`` is ``RGB`` or ``BGR``."""
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        self._embedding = self.model.embed(image if image_format == "RGB" else image[..., ::-1])

    def set_torch_image(self, transformed_image: Tensor, original_image_size: tuple[int, ...]) -> None:
        """Embed (1, 3, h, w) pixels that are already as the model's rules resize them: 0 to 255 for most families."""
        shape, side = tuple(transformed_image.shape), self.model.image_size
        if len(shape) != 4 or shape[:2] != (1, 3) or max(shape[2:]) != side:
            raise ValueError(f"pixels must be (1, 3, h, w) with a long side of {side}, got {shape}")
        height, width = original_image_size
        self._embedding = self.model.embed_resized(transformed_image, (height, width))

    def reset_image(self) -> None:
        """Forget the picture."""
        self._embedding = None

    def get_image_embedding(self) -> Tensor:
        """(1, C, g, g), float32, contiguous."""
        return self.embedding.features.contiguous()

    def predict(
        self,
        point_coords: NDArray[np.floating] | NDArray[np.integer] | None = None,
        point_labels: NDArray[np.integer] | None = None,
        box: NDArray[np.floating] | NDArray[np.integer] | None = None,
        mask_input: NDArray[np.floating] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[NDArray[np.bool_] | NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Masks for one prompt.

        ``point_coords`` (N, 2) in pixels (x, y) of the picture, ``point_labels`` (N,) 1 inside, 0 outside;
        ``box`` (4,) as x0, y0, x1, y1; ``mask_input`` (1, s, s) logits of an earlier call. Returns masks
        (M, H, W), bool or logits, predicted IoU (M,), and low-resolution logits (M, s, s).
        """
        coordinates = labels = boxes = mask = None
        if point_coords is not None:
            if point_labels is None:
                raise PromptError("point_labels must be supplied if point_coords is supplied")
            coordinates = self._scaled(np.asarray(point_coords, np.float64).reshape(1, -1, 2))
            labels = torch.as_tensor(np.asarray(point_labels), dtype=torch.int, device=self.device)[None]
            if coordinates.shape[1] != labels.shape[-1]:
                raise PromptError(f"{coordinates.shape[1]} points need as many labels, got {labels.shape[-1]}")
        if box is not None:
            boxes = self._scaled(np.asarray(box, np.float64).reshape(1, 2, 2)).reshape(1, 4)
        if mask_input is not None:
            mask = torch.as_tensor(np.asarray(mask_input), dtype=torch.float, device=self.device)[None]
        masks, iou, low_res = self.predict_torch(
            coordinates, labels, boxes, mask, multimask_output, return_logits=return_logits
        )
        return masks[0].cpu().numpy(), iou[0].cpu().numpy(), low_res[0].cpu().numpy()

    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for B prompts, with coordinates in pixels of the model's input (B, N, 2), (B, 4)."""
        points = None
        if point_coords is not None:
            if point_labels is None:
                raise PromptError("point_labels must be supplied if point_coords is supplied")
            points = (point_coords, point_labels)
        low_res, iou = self.model.decode(self.embedding, points, boxes, mask_input, multimask=multimask_output)
        masks = self.model.upscale(low_res, self.embedding)
        return (masks if return_logits else self.model.binary(masks)), iou, self.model.rules.kept(low_res)

    def _scaled(self, coordinates: NDArray[np.float64]) -> Tensor:
        scaled = self.model.scale_coordinates(torch.from_numpy(coordinates), self.embedding)
        return scaled.to(self.device)
