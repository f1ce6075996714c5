"""SAM-HQ with a ViT encoder (Ke et al. 2023, "Segment Anything in High Quality"): SAM, and a token of its own whose
mask comes from finer features and is added to SAM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hypersam.errors import LayoutMismatch
from hypersam.sam.families.decoder import DecoderConfig, SamDecoding, decoder_arguments, decoder_inputs, read_decoder
from hypersam.sam.families.mask_decoder import MaskDecoder, in_place
from hypersam.sam.families.sam_vit import SamViT, SamViTConfig, has_vit, read_vit
from hypersam.sam.families.shapes import Shapes, most_of
from hypersam.sam.family import Family
from hypersam.sam.network import Features, Prompts
from hypersam.sam.official import MLP, LayerNorm2d

has_hq = most_of(
    "mask_decoder.hf_token.",
    "mask_decoder.hf_mlp.",
    "mask_decoder.compress_vit_feat.",
    "mask_decoder.embedding_encoder.",
    "mask_decoder.embedding_maskfeature.",
)
"""Whether keys are those of a SAM-HQ, of some encoder."""
PUBLISHED_GLOBAL = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)}
"""Depth of a published encoder: its blocks with global attention."""


class HqMaskDecoder(MaskDecoder):
    """SAM's mask decoder with the high-quality token, its perceptron, and the convolutions that make its features.

    ``early_dim``: channels of the image encoder's early features.
    """

    def __init__(self, early_dim: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        dim = self.transformer_dim
        self.hf_token = nn.Embedding(1, dim)
        self.hf_mlp = MLP(dim, dim, dim // 8, 3)
        self.compress_vit_feat = _four_times_finer(early_dim, dim, dim // 8)
        self.embedding_encoder = _four_times_finer(dim, dim // 4, dim // 8)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(dim // 8, dim // 4, 3, padding=1),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 8, 3, padding=1),
        )

    def fine_features(self, embedding: Tensor, early: Tensor) -> Tensor:
        """Embedding (B, C, g, g) and early features (B, E, g, g) to (B, C / 8, 4 g, 4 g). They depend on the picture
        alone, so that they are made once a picture and not once a prompt."""
        fine: Tensor = self.embedding_encoder(embedding) + self.compress_vit_feat(early)
        return fine

    def hq_masks(
        self, fine: Tensor, embedding: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor, which: slice
    ) -> tuple[Tensor, Tensor]:
        """``which`` of SAM's masks and then the token's, (B, M + 1, 4 g, 4 g), and the predicted IoU (B, M) of SAM's.

        ``fine``: (1, C / 8, 4 g, 4 g), see ``fine_features``; the others are those of ``MaskDecoder.masks``.
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight])
        tokens, pixels = self.attended(own, embedding, positions, sparse, dense)
        up = self.upscaled(pixels)
        masks = in_place(self.kernels(tokens[:, 1:], which) @ up.transpose(1, 2))
        finer = self.embedding_maskfeature(in_place(up.transpose(1, 2))) + fine
        kernel = self.hf_mlp(tokens[:, 1 + self.num_mask_tokens])[:, None]
        mask = (kernel @ finer.flatten(2)).unflatten(2, finer.shape[2:])
        return torch.cat([masks, mask], 1), self.iou_prediction_head(tokens[:, 0])[:, which]


def _four_times_finer(inner: int, between: int, outer: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(inner, between, 2, stride=2),
        LayerNorm2d(between),
        nn.GELU(),
        nn.ConvTranspose2d(between, outer, 2, stride=2),
    )


def hq_mask_decoder(config: DecoderConfig, early_dim: int) -> HqMaskDecoder:
    """Of those sizes."""
    return HqMaskDecoder(early_dim, **decoder_arguments(config))


class HqDecoding(SamDecoding):
    """How SAM-HQ answers; features are the embedding and the fine features."""

    mask_decoder: HqMaskDecoder

    def decode(self, features: Features, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        """One mask: SAM's single one plus the token's, or with ``multimask`` the best of SAM's three plus the
        token's; with the predicted IoU of SAM's."""
        masks, iou = self._masks(features, prompts, slice(1, None) if multimask else slice(1))
        sam, token = masks[:, :-1], masks[:, -1:]
        if not multimask:
            return sam + token, iou
        best = iou.argmax(1, keepdim=True)
        return sam.take_along_dim(best[..., None, None], 1) + token, iou.take_along_dim(best, 1)

    def _masks(self, features: Features, prompts: Prompts, which: slice) -> tuple[Tensor, Tensor]:
        """The same, and behind SAM's masks the token's."""
        inputs = decoder_inputs(self.prompt_encoder, features[0], prompts)
        return self.mask_decoder.hq_masks(features[1], **inputs, which=which)


class SamHq(HqDecoding, SamViT):
    """The whole network; every key as in the official checkpoints."""

    family = "sam_hq_vit"

    def __init__(self, config: SamViTConfig) -> None:
        super().__init__(config)
        self.mask_decoder = hq_mask_decoder(config.decoder, config.embed_dim)

    def encode(self, pixels: Tensor, *, recompute: bool = False) -> Features:
        """Embedding and fine features, these from what the first block with global attention gives."""
        embedding, early = self.image_encoder.with_early(pixels, recompute=recompute)
        embedding = embedding.float()
        return embedding, self.mask_decoder.fine_features(embedding, early.float())


def _read(tensors: Mapping[str, Tensor]) -> SamViTConfig:
    shapes = Shapes(tensors, "SAM-HQ")
    config = read_vit(shapes, read_decoder(shapes))
    if 0 not in config.windows:
        raise LayoutMismatch("a SAM-HQ takes features from its first block with global attention; this one has none")
    if any(config.windows) or config.depth == 1:
        return config
    # Windows as large as the picture have the shapes of global attention and give the same, but features are taken
    # from the first block that is global by name.
    if config.depth not in PUBLISHED_GLOBAL:
        depths = ", ".join(map(str, PUBLISHED_GLOBAL))
        raise LayoutMismatch(
            "a SAM-HQ takes features from its first block with global attention, and which that is does not show in "
            f"these shapes, where all blocks have the {config.grid} patches a side of the picture; it is known for the "
            f"published depths ({depths}), not for {config.depth}"
        )
    named = PUBLISHED_GLOBAL[config.depth]
    return replace(config, windows=tuple(0 if i in named else config.grid for i in range(config.depth)))


FAMILY = Family(
    id="sam_hq_vit",
    recognises=lambda keys: has_vit(keys) and has_hq(keys),
    read=_read,
    config=SamViTConfig,
    network=SamHq,
)
