"""Prompt encoder and mask decoder of SAM, shared by the families that changed only the image encoder.

Their layers are segment-anything's (Kirillov et al. 2023), their sizes are read off the shapes, and how they are
computed is in ``mask_decoder``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hypersam.errors import LayoutMismatch
from hypersam.sam.families.mask_decoder import MaskDecoder, PromptEncoder, TwoWayTransformer
from hypersam.sam.families.shapes import Shapes
from hypersam.sam.network import Features, Prompts, SamNetwork
from hypersam.sam.rules import LONGEST_SIDE

HEADS = 8
"""Of the decoder's attention: they are in no checkpoint, and every published SAM has eight."""


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of prompt encoder and mask decoder. ``dim``: channels of the embedding and of the prompts."""

    dim: int
    mask_in_chans: int
    multimask_outputs: int
    depth: int
    mlp_dim: int
    iou_depth: int
    iou_hidden: int


def read_decoder(shapes: Shapes) -> DecoderConfig:
    """Raises LayoutMismatch naming what does not fit."""
    dim = shapes.of("prompt_encoder.no_mask_embed.weight", 2)[1]
    if dim % HEADS:
        raise LayoutMismatch(f"an embedding of {dim} channels is no multiple of {HEADS} heads")
    return DecoderConfig(
        dim=dim,
        mask_in_chans=shapes.of("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        multimask_outputs=shapes.of("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        depth=shapes.depth("mask_decoder.transformer.layers."),
        mlp_dim=shapes.of("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        iou_depth=shapes.depth("mask_decoder.iou_prediction_head.layers."),
        iou_hidden=shapes.of("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    )


def prompt_encoder(config: DecoderConfig, *, grid: int, image_size: int) -> PromptEncoder:
    """For embeddings of ``grid`` x ``grid``."""
    return PromptEncoder(
        embed_dim=config.dim,
        image_embedding_size=(grid, grid),
        input_image_size=(image_size, image_size),
        mask_in_chans=config.mask_in_chans,
    )


def decoder_arguments(config: DecoderConfig) -> dict[str, Any]:
    """What a ``MaskDecoder``, or a class derived from it, is made with."""
    return {
        "num_multimask_outputs": config.multimask_outputs,
        "transformer": TwoWayTransformer(
            depth=config.depth, embedding_dim=config.dim, mlp_dim=config.mlp_dim, num_heads=HEADS
        ),
        "transformer_dim": config.dim,
        "iou_head_depth": config.iou_depth,
        "iou_head_hidden_dim": config.iou_hidden,
    }


def mask_decoder(config: DecoderConfig) -> MaskDecoder:
    """SAM's."""
    return MaskDecoder(**decoder_arguments(config))


class SamDecoding(SamNetwork):
    """A network with SAM's prompt encoder and mask decoder; subclasses add the image encoder."""

    rules = LONGEST_SIDE
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder

    @property
    @abstractmethod
    def grid(self) -> int:
        """Side of the embedding."""

    @property
    def low_res(self) -> int:
        """Four logits a patch, each way."""
        return 4 * self.grid

    def decode(self, features: Features, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        """Three masks with ``multimask``, else the one that has a token of its own."""
        return self._masks(features, prompts, slice(1, None) if multimask else slice(1))

    def every_mask(self, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """The single mask, then the three, then what else the decoder has."""
        return self._masks(features, prompts, slice(None))

    def _masks(self, features: Features, prompts: Prompts, which: slice) -> tuple[Tensor, Tensor]:
        """``which`` of SAM's masks, (B, M, s, s), and their predicted IoU (B, M)."""
        inputs = decoder_inputs(self.prompt_encoder, features[0], prompts)
        return self.mask_decoder.masks(**inputs, which=which)


def decoder_inputs(encoder: PromptEncoder, embedding: Tensor, prompts: Prompts) -> dict[str, Tensor]:
    """What the mask decoder takes for B prompts on one picture."""
    sparse, dense = encoder(points=prompts.points, boxes=prompts.boxes, masks=prompts.masks)
    return {
        "embedding": embedding,
        "positions": encoder.positions(),
        "sparse": sparse,
        # Without masks all prompts have the same.
        "dense": dense if prompts.masks is not None else dense[:1],
    }


def resized_prompts(original: PromptEncoder, made: PromptEncoder, *, grid: int, side: int) -> None:
    """Tell ``made``, a shell of ``original``, the size of reduced pictures."""
    made.image_embedding_size = (grid, grid)
    made.input_image_size = (side, side)
    # Mask inputs are to the embedding as they were.
    scale = original.mask_input_size[0] // original.image_embedding_size[0]
    made.mask_input_size = (scale * grid, scale * grid)
