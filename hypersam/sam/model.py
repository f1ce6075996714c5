"""A SAM that is ready to be asked: pictures in, embeddings and masks out, the same calls for every family.

``SamModel`` owns the family's rules before and after the network (resizing, normalising, prompt
coordinates, mask upscaling); ``SamPredictor`` and the engine are two ways to call it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hypersam.errors import PromptError
from hypersam.sam.families.sam_vit import SamViT

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
MASK_THRESHOLD = 0.0


@dataclass(frozen=True)
class Embedding:
    """What the image encoder made of a picture. ``features`` is (1, C, g, g); sizes are (height, width)."""

    features: Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes that the features hold."""
        return self.features.numel() * self.features.element_size()


class SamModel:
    """A SAM with its rules. ``network`` may hold dense or compressed layers; both answer the same calls."""

    def __init__(self, network: SamViT, *, variant: str, device: torch.device, dtype: torch.dtype) -> None:
        self.network = network.eval().requires_grad_(False)
        self.variant, self.device, self.dtype = variant, device, dtype
        self.image_size = network.config.image_size
        self._mean = torch.tensor(PIXEL_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(PIXEL_STD, device=device).view(3, 1, 1)

    @property
    def low_res(self) -> int:
        """Side of the low-resolution masks, which are also the mask inputs."""
        return 4 * self.network.config.grid

    def resident_bytes(self) -> int:
        """Bytes of all parameters and buffers, compressed ones as they lie in memory."""
        held = [*self.network.parameters(), *self.network.buffers()]
        return sum(t.numel() * t.element_size() for t in held)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after scaling the long side to the model's input, rounded half up."""
        scale = self.image_size / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Scale (H, W, 3) to the model's input as Pillow's bilinear filter does, like the original code."""
        height, width = self.input_size(*image.shape[:2])
        if (height, width) == image.shape[:2]:
            return image
        # A very long and narrow picture still needs a row of pixels.
        size = (max(1, width), max(1, height))
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))

    @torch.inference_mode()
    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        """Run the image encoder over an RGB picture (uint8, H x W x 3)."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise PromptError(f"a picture is uint8 of shape (H, W, 3), got {image.dtype} {image.shape}")
        small = torch.from_numpy(np.array(self.resize(image))).permute(2, 0, 1)
        return self.embed_resized(small[None], image.shape[:2])

    @torch.inference_mode()
    def embed_resized(self, pixels: Tensor, original_size: tuple[int, int]) -> Embedding:
        """The same for (1, 3, h, w) pixels from 0 to 255, already scaled."""
        size = (pixels.shape[-2], pixels.shape[-1])
        x = (pixels.to(self.device, torch.float32) - self._mean) / self._std
        x = F.pad(x, (0, self.image_size - size[1], 0, self.image_size - size[0]))
        features = self.network.image_encoder(x.to(self.dtype))
        return Embedding(features.float(), (original_size[0], original_size[1]), size)

    def scale_coordinates(self, coordinates: Tensor, embedding: Embedding) -> Tensor:
        """(…, 2) pixels (x, y) of the picture as sent to pixels of the model's input."""
        (old_h, old_w), (new_h, new_w) = embedding.original_size, embedding.input_size
        factor = torch.tensor([new_w / old_w, new_h / old_h], dtype=torch.float64, device=coordinates.device)
        return (coordinates.double() * factor).float()

    @torch.inference_mode()
    def decode(
        self,
        embedding: Embedding,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        mask_input: Tensor | None,
        *,
        multimask: bool,
    ) -> tuple[Tensor, Tensor]:
        """Masks for B prompts on one picture.

        ``points``: coordinates (B, N, 2) in pixels of the model's input and labels (B, N); ``boxes`` (B, 4);
        ``mask_input`` logits (B, 1, s, s), s = ``low_res``. Returns low-resolution logits (B, M, s, s) and
        predicted IoU (B, M), M = 3 with ``multimask``, else 1; float32.
        """
        encoder, decoder = self.network.prompt_encoder, self.network.mask_decoder
        sparse, dense = encoder(points=points, boxes=boxes, masks=mask_input)
        masks, iou = decoder(
            image_embeddings=embedding.features,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return masks.float(), iou.float()

    @torch.inference_mode()
    def upscale(self, low_res: Tensor, embedding: Embedding) -> Tensor:
        """Logits (B, M, s, s) to logits (B, M, H, W) of the picture as sent."""
        side = self.image_size
        full = F.interpolate(low_res, (side, side), mode="bilinear", align_corners=False)
        full = full[..., : embedding.input_size[0], : embedding.input_size[1]]
        return F.interpolate(full, embedding.original_size, mode="bilinear", align_corners=False)
