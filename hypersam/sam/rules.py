"""What happens outside the network: pictures into its input, coordinates with them, its masks back to the picture.

Every family keeps its original's rules to the pixel, since a mask that moves by half a pixel is another mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Size = tuple[int, int]
"""(height, width)."""


class Rules(ABC):
    """Before and after a network whose input is ``side`` x ``side`` pixels."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @abstractmethod
    def input_size(self, size: Size, side: int) -> Size:
        """What a picture of ``size`` becomes within the network's input."""

    @abstractmethod
    def resized(self, image: NDArray[np.uint8], side: int) -> Tensor:
        """An RGB picture (H, W, 3) as float32 (1, 3, h, w) of ``input_size``, before normalising, on the CPU."""

    def normalised(self, pixels: Tensor, side: int) -> Tensor:
        """Resized pixels (B, 3, h, w) to the network's input (B, 3, side, side), padded right and below."""
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        return F.pad((pixels - mean) / std, (0, side - pixels.shape[-1], 0, side - pixels.shape[-2]))

    def scaled(self, coordinates: Tensor, original: Size, inner: Size) -> Tensor:
        """(…, 2) pixels (x, y) of the picture to pixels of the network's input, float32; ``inner``: its
        ``input_size``."""
        factor = torch.tensor(
            [inner[1] / original[1], inner[0] / original[0]], dtype=torch.float64, device=coordinates.device
        )
        return (coordinates.double() * factor).float()

    @abstractmethod
    def upscaled(self, low_res: Tensor, original: Size, inner: Size, side: int) -> Tensor:
        """Logits (B, M, s, s) to logits (B, M, H, W) of the picture."""

    def kept(self, low_res: Tensor) -> Tensor:
        """Low-resolution logits as they are handed out, to be given back as a mask input."""
        return low_res

    def binary(self, logits: Tensor) -> Tensor:
        """Which pixels belong to the mask."""
        return logits > 0


class LongestSide(Rules):
    """SAM, SAM-HQ, MobileSAM, TinySAM and EdgeSAM: the long side becomes the input's, the rest is padding."""

    mean = (123.675, 116.28, 103.53)
    std = (58.395, 57.12, 57.375)

    def input_size(self, size: Size, side: int) -> Size:
        """Rounded half up, at least a pixel: a very long and narrow picture still needs a row."""
        scale = side / max(size)
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def resized(self, image: NDArray[np.uint8], side: int) -> Tensor:
        """As Pillow's bilinear filter does it on bytes, like the original code; values 0 to 255."""
        height, width = self.input_size((image.shape[0], image.shape[1]), side)
        if (height, width) != image.shape[:2]:
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()

    def upscaled(self, low_res: Tensor, original: Size, inner: Size, side: int) -> Tensor:
        """Bilinear to the input's size, the padding cut off, bilinear to the picture's."""
        full = bilinear(low_res, (side, side))
        return bilinear(full[..., : inner[0], : inner[1]], original)


def bilinear(masks: Tensor, size: Size) -> Tensor:
    """(B, M, h, w) to (B, M, *size). Each mask is a picture of its own: as channels of one, PyTorch would turn them
    round and back where one thread does it, in two to three times the time."""
    alone = masks.flatten(0, 1)[:, None]
    return F.interpolate(alone, size, mode="bilinear", align_corners=False).view(*masks.shape[:2], *size)


LONGEST_SIDE = LongestSide()


class Stretched(Rules):
    """The picture is stretched to the square input, whatever its sides."""

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def input_size(self, size: Size, side: int) -> Size:
        """The whole square."""
        return side, side


class Sam2Rules(Stretched):
    """SAM 2 (Ravi et al. 2024)."""

    def resized(self, image: NDArray[np.uint8], side: int) -> Tensor:
        """Bilinear with antialiasing on values from 0 to 1."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=True)

    def upscaled(self, low_res: Tensor, original: Size, inner: Size, side: int) -> Tensor:
        """Bilinear, in one step."""
        return bilinear(low_res, original)

    def kept(self, low_res: Tensor) -> Tensor:
        """Between -32 and 32."""
        return low_res.clamp(-32.0, 32.0)


class EfficientSamRules(Stretched):
    """EfficientSAM (Xiong et al. 2023)."""

    def resized(self, image: NDArray[np.uint8], side: int) -> Tensor:
        """Bilinear on values from 0 to 1, each pixel from its four neighbours however much the picture shrinks."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
        return pixels

    def scaled(self, coordinates: Tensor, original: Size, inner: Size) -> Tensor:
        """What lies left of the picture or above it becomes -1, as the original has it."""
        made = super().scaled(coordinates, original, inner)
        return torch.where(made < 0, -1.0, made)

    def upscaled(self, low_res: Tensor, original: Size, inner: Size, side: int) -> Tensor:
        """Bicubic, in one step."""
        return F.interpolate(low_res, original, mode="bicubic", align_corners=False)

    def binary(self, logits: Tensor) -> Tensor:
        """Zero belongs to the mask here."""
        return logits >= 0
