"""SAM 2 and SAM 2.1 for pictures (Ravi et al. 2024): a Hiera encoder whose finer features go to the mask decoder too.

What a video needs beside that, its memory, is carried through compression and is in no network. The layers are
written from the papers and the checkpoints' keys; the encoder is in ``hiera``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hypersam.errors import LayoutMismatch
from hypersam.sam.families.decoder import DecoderConfig, decoder_arguments, decoder_inputs, resized_prompts
from hypersam.sam.families.hiera import STAGES, STRIDE, ImageEncoder
from hypersam.sam.families.mask_decoder import MaskDecoder, PromptEncoder, in_place
from hypersam.sam.families.shapes import Shapes, checked, most_of
from hypersam.sam.family import Family
from hypersam.sam.network import LARGEST_SIDE, Features, Prompts, SamNetwork, shell
from hypersam.sam.official import MLP
from hypersam.sam.rules import Sam2Rules

_TRUNK = "image_encoder.trunk."
_LATER = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.")
"""What SAM 2.1 has and SAM 2 has not."""
_MEMORY = "maskmem_tpos_enc"
"""Both have it, but not a file from which all that pictures do not need was taken."""
_IMAGE_SIZE = 1024
PATCH = 16
"""Pixels of the picture a side of an embedding's pixel."""
_DELTA, _STABLE = 0.05, 0.98
"""A single mask is given up for the best of three where the IoU of its areas above +0.05 and above -0.05 is lower."""
_LISTS = ("releases", "stages", "global_blocks", "windows")
# First width and blocks a stage: heads of the first stage, blocks with global attention, window sides a stage.
_PUBLISHED: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    (96, (1, 2, 7, 2)): (1, (5, 7, 9), (8, 4, 14, 7)),
    (96, (1, 2, 11, 2)): (1, (7, 10, 13), (8, 4, 14, 7)),
    (112, (2, 3, 16, 3)): (2, (12, 16, 20), (8, 4, 14, 7)),
    (144, (2, 6, 36, 4)): (2, (23, 33, 43), (8, 4, 16, 8)),
}
_VIDEO = (
    "memory_attention.",
    "memory_encoder.",
    "mask_downsample.",
    "obj_ptr_proj.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_ptr",
    *_LATER,
    # Whether there is an object at all, which is asked of videos.
    "sam_mask_decoder.pred_obj_score_head.",
)


@dataclass(frozen=True)
class Sam2Config:
    """Sizes of a SAM 2. ``releases``: 20 for SAM 2, 21 for SAM 2.1, both where the file has none of the video's memory,
    by which alone they differ. ``stages``: blocks of each; widths and heads double from one to the
    next, from ``embed_dim`` and ``heads``. ``windows``: sides of a stage's attention windows, in its tokens;
    ``global_blocks`` attend to everything. ``background``: side of the coarse table of positions."""

    releases: tuple[int, ...]
    image_size: int
    embed_dim: int
    heads: int
    stages: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...]
    background: int
    mlp_ratio: int
    decoder: DecoderConfig

    @property
    def grid(self) -> int:
        """Side of the embedding."""
        return self.image_size // PATCH

    @property
    def may_be_first(self) -> bool:
        """Whether it may be SAM 2."""
        return 20 in self.releases

    @property
    def may_be_later(self) -> bool:
        """Whether it may be SAM 2.1."""
        return 21 in self.releases

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``from_dict`` reads it."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _LISTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sam2Config:
        """The inverse of ``as_dict``. Raises ValueError where a field is missing, unknown or no positive number."""
        found = checked(cls, values, lists=_LISTS)
        for name in ("stages", "windows"):
            if len(found[name]) != STAGES or 0 in found[name]:
                raise ValueError(f"{name} must be {STAGES} positive numbers, not {list(found[name])}")
        if found["embed_dim"] % found["heads"]:
            raise ValueError(f"{found['heads']} heads do not divide a width of {found['embed_dim']}")
        if any(side % 2 for side in found["windows"][:-1]):
            raise ValueError(f"windows are halved from stage to stage; {list(found['windows'])} are not all even")
        return cls(**found | {"decoder": DecoderConfig(**checked(DecoderConfig, found["decoder"]))})


def _read(tensors: Mapping[str, Tensor]) -> Sam2Config:
    shapes = Shapes(tensors, "SAM 2")
    embed_dim = shapes.of(_TRUNK + "patch_embed.proj.weight", 4)[0]
    blocks = shapes.layers(_TRUNK + "blocks.")
    # A stage begins where a block has a projection to another width.
    wider = (i for i, keys in enumerate(blocks) if any(key.startswith("proj.") for key in keys))
    starts = [0, *wider, len(blocks)]
    stages = tuple(last - first for first, last in pairwise(starts))
    known = _PUBLISHED.get((embed_dim, stages))
    if known is None:
        sizes = "; ".join(f"{width}: {', '.join(map(str, blocks))}" for width, blocks in _PUBLISHED)
        raise LayoutMismatch(
            "the heads and windows of a SAM 2 do not show in its shapes, so that only published sizes are read (first "
            f"width: blocks a stage; {sizes}); this one has {embed_dim}: {', '.join(map(str, stages))}"
        )
    heads, global_blocks, windows = known
    mask_decoder = "sam_mask_decoder."
    dim = shapes.of("sam_prompt_encoder.no_mask_embed.weight", 2)[1]
    return Sam2Config(
        releases=(21,) if any(map(shapes.has, _LATER)) else (20,) if shapes.has(_MEMORY) else (20, 21),
        image_size=_IMAGE_SIZE,
        embed_dim=embed_dim,
        heads=heads,
        stages=stages,
        global_blocks=global_blocks,
        windows=windows,
        background=shapes.of(_TRUNK + "pos_embed", 4)[2],
        mlp_ratio=max(1, shapes.of(_TRUNK + "blocks.0.mlp.layers.0.weight", 2)[0] // embed_dim),
        decoder=DecoderConfig(
            dim=dim,
            mask_in_chans=shapes.of("sam_prompt_encoder.mask_downscaling.3.weight", 4)[0],
            multimask_outputs=shapes.of(mask_decoder + "mask_tokens.weight", 2)[0] - 1,
            depth=shapes.depth(mask_decoder + "transformer.layers."),
            mlp_dim=shapes.of(mask_decoder + "transformer.layers.0.mlp.layers.0.weight", 2)[0],
            iou_depth=shapes.depth(mask_decoder + "iou_prediction_head.layers."),
            iou_hidden=shapes.of(mask_decoder + "iou_prediction_head.layers.0.weight", 2)[0],
        ),
    )


class Sam2(SamNetwork):
    """The network for pictures; every key of it as in the official checkpoints. Features are the embedding and the
    finer ones of a quarter and an eighth of the picture's side, already projected for the mask decoder."""

    family = "sam2_hiera"
    rules = Sam2Rules()
    config: Sam2Config
    image_encoder: ImageEncoder

    def __init__(self, config: Sam2Config) -> None:
        super().__init__()
        self.config = config
        decoder = config.decoder
        self.image_encoder = ImageEncoder(config)
        self.sam_prompt_encoder = Sam2PromptEncoder(
            embed_dim=decoder.dim,
            image_embedding_size=(config.grid, config.grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=decoder.mask_in_chans,
        )
        self.sam_mask_decoder = Sam2MaskDecoder(decoder)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, decoder.dim))

    @property
    def low_res(self) -> int:
        """Four logits an embedding's pixel, each way."""
        return 4 * self.config.grid

    def encode(self, pixels: Tensor, *, recompute: bool = False) -> Features:
        """Embedding (B, C, g, g), (B, C / 8, 4 g, 4 g) and (B, C / 4, 2 g, 2 g)."""
        finest, finer, embedding = (level.float() for level in self.image_encoder(pixels, recompute=recompute))
        # What stands for the memory of a video that has none yet.
        embedding = embedding + self.no_mem_embed.view(1, -1, 1, 1)
        return embedding, self.sam_mask_decoder.conv_s0(finest), self.sam_mask_decoder.conv_s1(finer)

    def decode(self, features: Features, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        """Three masks with ``multimask``, else the single one where it is stable and the best of the three where it
        is not, as the original's image predictor does."""
        if multimask:
            return self._masks(features, prompts, slice(1, None))
        masks, iou = self.every_mask(features, prompts)
        best = 1 + iou[:, 1:].argmax(1, keepdim=True)
        chosen = torch.where(stability(masks[:, :1]) >= _STABLE, 0, best)
        return masks.take_along_dim(chosen[..., None, None], 1), iou.take_along_dim(chosen, 1)

    def every_mask(self, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """The single mask, then the three."""
        return self._masks(features, prompts, slice(None))

    def _masks(self, features: Features, prompts: Prompts, which: slice) -> tuple[Tensor, Tensor]:
        embedding, finest, finer = features
        inputs = decoder_inputs(self.sam_prompt_encoder, embedding, prompts)
        return self.sam_mask_decoder.finer_masks(finer, finest, **inputs, which=which)

    def affordable_side(self) -> int:
        """At most 256 pixels."""
        return min(self.config.image_size, LARGEST_SIDE)

    def reduced(self, side: int) -> Sam2:
        """For ``side`` pixels, a multiple of 64 up to its own side, so that windows and their positions still meet."""
        config = self.config
        step = STRIDE * config.windows[0] * 2
        if side != config.image_size and (side % step or not step <= side < config.image_size):
            raise ValueError(f"the side must be a multiple of {step} up to {config.image_size}, not {side}")
        if side == config.image_size:
            return self
        small = shell(self)
        small.config = replace(config, image_size=side)
        small.image_encoder = shell(self.image_encoder)
        small.image_encoder.trunk = shell(self.image_encoder.trunk)
        small.image_encoder.trunk.shown = side // STRIDE
        small.sam_prompt_encoder = shell(self.sam_prompt_encoder)
        resized_prompts(self.sam_prompt_encoder, small.sam_prompt_encoder, grid=side // PATCH, side=side)
        return small


def stability(masks: Tensor) -> Tensor:
    """IoU (B, M) of what lies above +0.05 with what lies above -0.05 in logits (B, M, s, s); 1 where both are empty."""
    inner, outer = (masks > _DELTA).flatten(2).sum(-1).float(), (masks > -_DELTA).flatten(2).sum(-1).float()
    return torch.where(outer > 0, inner / outer.clamp(min=1), 1.0)


class Sam2PromptEncoder(PromptEncoder):
    """SAM's, but for the order of tokens: a box's corners, then points, and always a padding point behind them."""

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) and the dense embedding (B, C, g, g)."""
        count = self._get_batch_size(points, boxes, masks)
        device = self._get_device()
        tokens = [torch.empty(count, 0, self.embed_dim, device=device)]
        if boxes is not None:
            tokens.append(self._embed_boxes(boxes))
        if points is not None or boxes is not None:
            none = torch.empty(count, 0, 2, device=device), torch.empty(count, 0, device=device)
            tokens.append(self._embed_points(*(none if points is None else points), pad=True))
        if masks is not None:
            return torch.cat(tokens, 1), self._embed_masks(masks)
        dense = self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(count, -1, *self.image_embedding_size)
        return torch.cat(tokens, 1), dense


class Sam2MaskDecoder(MaskDecoder):
    """SAM's with a token that tells whether there is an object, and finer features added while it upscales."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(**decoder_arguments(config))
        dim = config.dim
        for layer in self.transformer.layers:
            layer.mlp = MLP(dim, config.mlp_dim, dim, 2)
        self.iou_prediction_head = MLP(
            dim, config.iou_hidden, self.num_mask_tokens, config.iou_depth, sigmoid_output=True
        )
        self.obj_score_token = nn.Embedding(1, dim)
        self.conv_s0 = nn.Conv2d(dim, dim // 8, 1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, 1)

    def finer_masks(
        self, finer: Tensor, finest: Tensor, embedding: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor,
        which: slice,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits (B, M, 4 g, 4 g) and predicted IoU (B, M) of ``which`` masks for B prompts on one picture.

        ``finer`` (1, C / 4, 2 g, 2 g) and ``finest`` (1, C / 8, 4 g, 4 g) are the image encoder's, the others those of
        ``MaskDecoder.masks``.
        """
        own = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens, pixels = self.attended(own, embedding, positions, sparse, dense)
        kernels = self.kernels(tokens[:, 2:], which)
        masks = in_place(kernels @ self.upscaled(pixels, finer, finest).transpose(1, 2))
        return masks, self.iou_prediction_head(tokens[:, 1])[:, which]


FAMILY = Family(
    id="sam2_hiera",
    recognises=most_of(_TRUNK + "blocks.", _TRUNK + "patch_embed.", _TRUNK + "pos_embed", "image_encoder.neck.convs."),
    read=_read,
    config=Sam2Config,
    network=Sam2,
    carries=lambda key: key.startswith(_VIDEO),
)
