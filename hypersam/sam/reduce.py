"""A SAM for smaller pictures that shares the weights of a large one.

Sensitivities and fidelity need many passes, and a pass of ViT-H over 1024 pixels takes minutes on a CPU.
The reduced network keeps every layer (dense or compressed, the same objects, no copies) and cuts only what
depends on the picture's size: the table of positions and the relative positions of the global blocks. They
are cut, not interpolated, so that a token sees its neighbours at the distances it was trained with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hypersam.sam.families.sam_vit import SamViT, SamViTConfig

LARGEST_SIDE = 256
"""Networks for pictures of up to this many pixels are used as they are unless told otherwise."""

_Module = TypeVar("_Module", bound=nn.Module)


def affordable_side(config: SamViTConfig) -> int:
    """Side in pixels at which a pass is cheap: the model's own up to 256, else one whole attention window,
    so that no token is padding (14 patches of 16 pixels, 224, for the published sizes)."""
    if config.image_size <= LARGEST_SIDE:
        return config.image_size
    window = max(config.windows)
    patches = window if window and window * config.patch <= LARGEST_SIDE else LARGEST_SIDE // config.patch
    return min(config.image_size, max(1, patches) * config.patch)


def reduced(network: SamViT, side: int) -> SamViT:
    """The network for pictures of ``side`` pixels, a multiple of the patch, at most its own side.

    Layers, mask decoder and buffers are those of ``network`` itself; tables that shrink are views.
    Raises ValueError for another side.
    """
    config = network.config
    if side % config.patch or not config.patch <= side <= config.image_size:
        raise ValueError(f"the side must be a multiple of {config.patch} up to {config.image_size}, not {side}")
    if side == config.image_size:
        return network
    grid = side // config.patch
    small = _shell(network)
    small.config = replace(config, image_size=side)
    encoder = _shell(network.image_encoder)
    first = (config.grid - grid) // 2
    encoder.pos_embed = _cut(encoder.pos_embed, (slice(None), *[slice(first, first + grid)] * 2))
    blocks = []
    for original in network.image_encoder.blocks:
        block: Any = _shell(original)
        if not block.window:
            attention: Any = _shell(block.attn)
            near = slice(attention.side - grid, attention.side + grid - 1)
            attention.rel_pos_h = _cut(attention.rel_pos_h, (near,))
            attention.rel_pos_w = _cut(attention.rel_pos_w, (near,))
            attention.side = grid
            block.attn = attention
        blocks.append(block)
    encoder.blocks = nn.ModuleList(blocks)
    small.image_encoder = encoder
    prompts = _shell(network.prompt_encoder)
    prompts.image_embedding_size = (grid, grid)
    prompts.input_image_size = (side, side)
    prompts.mask_input_size = (4 * grid, 4 * grid)
    small.prompt_encoder = prompts
    return small


def sharing(config: SamViTConfig, tensors: Mapping[str, Tensor]) -> SamViT:
    """A dense network in fp32 on the storage of a state dict: no copy of what is fp32 already.

    Its parameters are new objects, so that gradients and hooks leave other owners of the storage alone.
    """
    with torch.device("meta"):
        network = SamViT(config)
    network.load_state_dict({k: v.detach().float() for k, v in tensors.items()}, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _shell(module: _Module) -> _Module:
    """The same module with tables of its own: parameters and children are shared until they are replaced."""
    shell = copy.copy(module)
    shell._parameters = dict(module._parameters)
    shell._modules = dict(module._modules)
    return shell


def _cut(table: Tensor, part: tuple[slice, ...]) -> nn.Parameter:
    return nn.Parameter(table.detach()[part], requires_grad=table.requires_grad)
