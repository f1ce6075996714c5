"""SAM's mask decoder (Kirillov et al. 2023, appendix A) with its products put in another order.

The layers, and so the keys, are segment-anything's. A prompt is a handful of tokens and a picture thousands of pixels,
so everything that has a row for every pixel is what a click costs:

- Where tokens attend to pixels, (x Wₖᵀ) qᵀ = x (Wₖᵀ qᵀ) and a (x Wᵥᵀ) = (a x) Wᵥᵀ: the projections go to the tokens'
  side, and likewise where pixels attend to tokens. Pixels are then projected to nothing and have no heads to separate,
  and whatever has a number for each of them lies in long rows.
- What the prompts on one picture share, its pixels in the first layer, is there once.
- A transposed convolution of two by two pixels that do not overlap is a product a pixel; norms and activations follow
  in that order of pixels, and only the finished masks are put in the picture's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersam.sam import official
from kernels.hyperlinear import HyperLinear


class Attention(Protocol):
    """Several heads within fewer channels; the four are linear layers, dense or compressed."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of ``q`` to ``k``."""


class RemembersPositions(ABC):
    """Of a module, a prompt encoder with SAM's ``pe_layer``: it works out the places of the embedding's pixels once."""

    pe_layer: Any
    _known: tuple[Tensor, tuple[int, int], Tensor] | None = None

    @property
    @abstractmethod
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the embedding."""

    @property
    def positions_bytes(self) -> int:
        """What is kept from the first prompt on, whether or not there was one."""
        rows, columns = self.grid_size
        matrix: Tensor = self.pe_layer.positional_encoding_gaussian_matrix
        return rows * columns * 2 * matrix.shape[1] * matrix.element_size()

    def positions(self) -> Tensor:
        """(1, g·g, C): the encoding of every pixel's place."""
        matrix, size = self.pe_layer.positional_encoding_gaussian_matrix, self.grid_size
        if self._known is None or self._known[0] is not matrix or self._known[1] != size:
            self._known = matrix, size, self.pe_layer(size).flatten(1).t()[None].contiguous()
        return self._known[2]

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        self._known = None
        super()._load_from_state_dict(*arguments, **more)  # type: ignore[misc]


class PromptEncoder(RemembersPositions, official.PromptEncoder):  # type: ignore[misc]
    """SAM's."""

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the embedding."""
        size: tuple[int, int] = self.image_embedding_size
        return size


class MaskDecoder(official.MaskDecoder):  # type: ignore[misc]
    """The layers of SAM's; ``transformer`` is a ``TwoWayTransformer`` of this module. It is asked by ``masks``."""

    def predict_masks(self, *_: Any, **__: Any) -> Any:
        """Not of this decoder, whose transformer takes other arguments."""
        raise NotImplementedError("this mask decoder is asked by its method masks")

    def masks(
        self, embedding: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor, which: slice
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, M, 4 g, 4 g) and predicted IoU (B, M) of ``which`` masks for B prompts on one picture.

        ``embedding`` (1, C, g, g); ``positions`` (1, g·g, C); ``sparse`` (B, N, C); ``dense`` (B, C, g, g), or
        (1, C, g, g) where no prompt has a mask.
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens, pixels = self.attended(own, embedding, positions, sparse, dense)
        kernels = self.kernels(tokens[:, 1:], which)
        found = in_place(kernels @ self.upscaled(pixels).transpose(1, 2))
        return found, self.iou_prediction_head(tokens[:, 0])[:, which]

    def attended(
        self, own: Tensor, embedding: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the transformer makes of the decoder's ``own`` tokens (M, C) and the prompts', (B, M + N, C), and of the
        picture, (B, g·g, C)."""
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], 1)
        pixels = (embedding + dense).flatten(2).transpose(1, 2).contiguous()
        answer: tuple[Tensor, Tensor] = self.transformer(pixels, positions, tokens)
        return answer

    def kernels(self, tokens: Tensor, which: slice) -> Tensor:
        """(B, M, C / 8): what the masks are the finer features' product with, of the mask tokens (B, ≥ M, C)."""
        chosen = range(self.num_mask_tokens)[which]
        return torch.stack([self.output_hypernetworks_mlps[i](tokens[:, i]) for i in chosen], 1)

    def upscaled(self, pixels: Tensor, finer: Tensor | None = None, finest: Tensor | None = None) -> Tensor:
        """(B, g·g, C) to (B, g·g·16, C / 8): four by four for each pixel, as ``in_place`` takes them.

        ``finer`` (1, C / 4, 2 g, 2 g) and ``finest`` (1, C / 8, 4 g, 4 g) are added after the first step and the
        second.
        """
        first, norm, activate, second, activate_too = self.output_upscaling
        side = math.isqrt(pixels.shape[1])
        up = doubled(first, pixels)
        if finer is not None:
            blocks = finer.permute(0, 2, 3, 1).unflatten(2, (side, 2)).unflatten(1, (side, 2))
            up = (up.view(-1, side, side, 2, 2, up.shape[-1]) + blocks.transpose(2, 3)).view(up.shape)
        up = doubled(second, activate(F.layer_norm(up, norm.weight.shape, norm.weight, norm.bias, norm.eps)))
        if finest is not None:
            blocks = finest.permute(0, 2, 3, 1).unflatten(2, (side, 2, 2)).unflatten(1, (side, 2, 2))
            blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7)
            up = (up.view(-1, side, side, 2, 2, 2, 2, up.shape[-1]) + blocks).view(up.shape)
        return activate_too(up)  # type: ignore[no-any-return]


class TwoWayTransformer(official.TwoWayTransformer):  # type: ignore[misc]
    """The layers of SAM's."""

    def forward(self, pixels: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and pixels, (1, N, C) or (B, N, C), to both after all layers: (B, T, C), (B, N, C).

        ``positions``: (1, N, C), of the pixels.
        """
        queries = tokens
        for layer in self.layers:
            if layer.skip_first_layer_pe:
                queries = layer.norm1(layer.self_attn(queries, queries, queries))
            else:
                placed = queries + tokens
                queries = layer.norm1(queries + layer.self_attn(placed, placed, queries))
            where = pixels + positions
            found = to_pixels(layer.cross_attn_token_to_image, self.num_heads, queries + tokens, where, pixels)
            queries = layer.norm2(queries + found)
            queries = layer.norm3(queries + layer.mlp(queries))
            told = layer.cross_attn_image_to_token
            pixels = layer.norm4(plus_tokens(pixels, told, self.num_heads, where, queries + tokens, queries))
        found = to_pixels(self.final_attn_token_to_image, self.num_heads, queries + tokens, pixels + positions, pixels)
        return self.norm_final_attn(queries + found), pixels


def to_pixels(attention: Attention, heads: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Tokens attend to pixels: ``queries`` (B, T, C), ``keys`` and ``values`` (1 or B, N, C) to (B, T, C).

    The bias of ``k_proj`` adds the same to all scores of a query, which a softmax does not see.
    """
    if not _few(queries, attention, heads):
        return attention(queries, keys, values)
    query = attention.q_proj(queries)
    own = _own_head(query, heads)
    width = query.shape[-1] // heads
    folded = _transposed(attention.k_proj, (query[:, None] * own).flatten(1, 2) * width**-0.5)
    shape = folded.shape
    if keys.shape[0] == 1:
        folded = folded.reshape(1, -1, shape[-1])
    found = torch.softmax(folded @ keys.transpose(1, 2), -1) @ values
    projected = attention.v_proj(found.view(shape)).unflatten(1, (heads, -1))
    return attention.out_proj((projected * own).sum(1))  # type: ignore[no-any-return]


def plus_tokens(
    pixels: Tensor, attention: Attention, heads: int, queries: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Pixels attend to tokens: ``pixels`` and ``queries`` (1 or B, N, C), ``keys`` and ``values`` (B, T, C); what is
    found is added to ``pixels``: (B, N, C)."""
    if not _few(keys, attention, heads):
        return pixels + attention(queries, keys, values)
    key, value = attention.k_proj(keys), attention.v_proj(values)
    own = _own_head(key, heads)
    key = (key[:, None] * own).flatten(1, 2) * (key.shape[-1] // heads) ** -0.5
    folded = _transposed(attention.q_proj, key)
    shared = queries.shape[0] == 1
    scores = (folded.flatten(0, 1)[None] if shared else folded) @ queries.transpose(1, 2)
    scores = scores.view(*folded.shape[:2], -1) + (key @ attention.q_proj.bias.to(key.dtype))[..., None]
    weights = scores.unflatten(1, (heads, -1)).softmax(2).flatten(1, 2)
    rows = attention.out_proj((value[:, None] * own).flatten(1, 2))
    # The weights of every head sum to one, so that the rows' biases would be added once a head.
    rows = rows - attention.out_proj.bias.to(rows.dtype) * (1 - 1 / heads)
    return torch.baddbmm(pixels, weights.transpose(1, 2), rows)


def doubled(convolution: nn.ConvTranspose2d, pixels: Tensor) -> Tensor:
    """A transposed convolution of two by two pixels with a stride of two: (B, n, …, C) to (B, n·…·4, C'), of each pixel
    its four in rows."""
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    assert convolution.bias is not None
    made = torch.addmm(convolution.bias.repeat(4), pixels.flatten(0, -2), weight)
    return made.view(pixels.shape[0], -1, convolution.weight.shape[1])


def in_place(masks: Tensor) -> Tensor:
    """(B, M, g·g·16) as ``MaskDecoder.upscaled`` orders them to (B, M, 4 g, 4 g)."""
    side = math.isqrt(masks.shape[-1] // 16)
    cells: Tensor = masks.unflatten(2, (side, side, 2, 2, 2, 2))
    return cells.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(*masks.shape[:2], 4 * side, 4 * side)


def _few(tokens: Tensor, attention: Attention, heads: int) -> bool:
    """Whether heads times tokens (B, T, C) are fewer than what pixels would be projected to and the copies that their
    heads take; found by measurement on a CPU. On a GPU compressed layers keep the official order: their kernels read
    the weight as it lies for that one alone, and nobody has measured the other."""
    if tokens.device.type != "cpu" and isinstance(attention.k_proj, HyperLinear):
        return False
    channels: int = attention.q_proj.out_features
    return 4 * heads * tokens.shape[1] <= 5 * channels


def _own_head(projected: Tensor, heads: int) -> Tensor:
    """(heads, 1, I): ones where a channel of ``projected`` (…, I) belongs to the head."""
    one = torch.eye(heads, dtype=projected.dtype, device=projected.device)
    return one.repeat_interleave(projected.shape[-1] // heads, 1)[:, None]


def _transposed(layer: Any, x: Tensor) -> Tensor:
    """``x`` (…, out) times a linear layer's weight: (…, in)."""
    made: Tensor = layer.transposed(x) if isinstance(layer, HyperLinear) else x @ layer.weight
    return made
