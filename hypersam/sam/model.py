"""A SAM that is ready to be asked: pictures in, embeddings and masks out, the same calls for every family.

``SamModel`` joins a network and its family's rules for what happens outside it; ``SamPredictor`` and the engine are
two ways to call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypersam.errors import PromptError, UnsupportedPrompt
from hypersam.sam.network import Features, Prompts, SamNetwork
from hypersam.sam.registry import VARIANTS, family_row

_IN_CACHE = 1 << 19
"""Numbers of an embedding, times the prompts, for each thread of a CPU, of which its caches hold what decoding makes.
Beyond that, and on two threads SAM's is there with one prompt, more at once take longer than one after another."""


@dataclass(frozen=True)
class Embedding:
    """What the image encoder made of a picture: the embedding (1, C, g, g) first. Sizes are (height, width)."""

    parts: Features
    original_size: tuple[int, int]
    input_size: tuple[int, int]

    @property
    def features(self) -> Tensor:
        """The embedding (1, C, g, g), float32."""
        return self.parts[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the features hold."""
        return sum(part.nbytes for part in self.parts)


class SamModel:
    """A SAM with its rules. ``network`` may hold dense or compressed layers; both answer the same calls."""

    def __init__(self, network: SamNetwork, *, variant: str, device: torch.device, dtype: torch.dtype) -> None:
        self.network = network.eval().requires_grad_(False)
        self.variant, self.device, self.dtype = variant, device, dtype
        self.family = family_row(network.family)
        self._always_multimask = any(row.id == variant and row.always_multimask for row in VARIANTS)
        self.rules = network.rules
        self.image_size = int(network.config.image_size)

    @property
    def low_res(self) -> int:
        """Side of the low-resolution masks, which are also the mask inputs."""
        return self.network.low_res

    def resident_bytes(self) -> int:
        """Bytes of all parameters and buffers, compressed ones as they lie in memory."""
        held = [*self.network.parameters(), *self.network.buffers()]
        return sum(t.numel() * t.element_size() for t in held)

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        """Run the image encoder over an RGB picture (uint8, H x W x 3)."""
        return self.embed_resized(self.resized(image), (image.shape[0], image.shape[1]))

    def resized(self, image: NDArray[np.uint8]) -> Tensor:
        """An RGB picture (uint8, H x W x 3) as (1, 3, h, w) pixels for ``embed_resized``, on the CPU."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise PromptError(f"a picture is uint8 of shape (H, W, 3), got {image.dtype} {image.shape}", field="image")
        return self.rules.resized(image, self.image_size)

    def embed_resized(self, pixels: Tensor, original_size: tuple[int, int]) -> Embedding:
        """The same for (1, 3, h, w) pixels that ``resized`` made."""
        return self.embed_batch([(pixels, original_size)])[0]

    @torch.inference_mode()
    def embed_batch(self, pictures: Sequence[tuple[Tensor, tuple[int, int]]]) -> list[Embedding]:
        """The same for several pictures in one call of the encoder, each with its original (height, width)."""
        inputs = [self.rules.normalised(p.to(self.device, torch.float32), self.image_size) for p, _ in pictures]
        # Decoders go from pixel to pixel: the channels of each lie together.
        parts = [
            part.to(torch.float32, memory_format=torch.channels_last)
            for part in self.network.encode(torch.cat(inputs).to(self.dtype))
        ]
        alone = len(pictures) == 1
        return [
            # A slice would keep the whole batch in memory for as long as one of its pictures is remembered.
            Embedding(
                tuple(part if alone else part[row : row + 1].clone() for part in parts),
                original_size,
                (pixels.shape[-2], pixels.shape[-1]),
            )
            for row, (pixels, original_size) in enumerate(pictures)
        ]

    def scale_coordinates(self, coordinates: Tensor, embedding: Embedding) -> Tensor:
        """(…, 2) pixels (x, y) of the picture as sent to pixels of the model's input."""
        return self.rules.scaled(coordinates, embedding.original_size, embedding.input_size)

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
        ``mask_input`` logits (B, 1, s, s), s = ``low_res``, or (1, 1, s, s) for all. Returns low-resolution logits
        (B, M, s, s) and predicted IoU (B, M), float32, M as the family has it: mostly 3 with ``multimask``, else 1.
        CPUs decode as many prompts at once as their caches hold. Raises UnsupportedPrompt for what the family cannot
        be asked, PromptError where the tensors are of different numbers of prompts, or of none.
        """
        count = 0 if points is None else points[0].shape[1]
        outside = points is not None and not self.family.background and bool((points[1] == 0).any())
        if refused := self.family.refusal(
            points=count, background=outside, box=boxes is not None, mask=mask_input is not None
        ):
            raise UnsupportedPrompt(refused[1], field=refused[0])
        try:
            asked = Prompts(points, boxes).count
            if mask_input is not None and len(mask_input) == 1 < asked:
                mask_input = mask_input.expand(asked, -1, -1, -1)
            prompts = Prompts(points, boxes, mask_input)
            count = prompts.count
        except ValueError as error:
            raise PromptError(str(error)) from error
        if not count:
            raise PromptError("there is no prompt")
        multimask = multimask or self._always_multimask
        each = count
        if self.device.type == "cpu":
            each = max(1, torch.get_num_threads() * _IN_CACHE // embedding.features.numel())
        decoded = [
            self.network.decode(embedding.parts, prompts[start : start + each], multimask=multimask)
            for start in range(0, count, each)
        ]
        masks, iou = decoded[0] if len(decoded) == 1 else map(torch.cat, zip(*decoded, strict=True))
        return masks.float(), iou.float()

    @torch.inference_mode()
    def upscale(self, low_res: Tensor, embedding: Embedding) -> Tensor:
        """Logits (B, M, s, s) to logits (B, M, H, W) of the picture as sent."""
        return self.rules.upscaled(low_res, embedding.original_size, embedding.input_size, self.image_size)

    def binary(self, logits: Tensor) -> Tensor:
        """Which pixels belong to the mask."""
        return self.rules.binary(logits)
