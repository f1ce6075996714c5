"""SAM 2's image encoder held against a slow composition in float64 that shares no code with it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersam.sam.families.sam2 import Sam2Config
from tests.hypersam.test_sam2 import SMALL, network


def attend(x: Tensor, state: dict[str, Tensor], name: str, heads: int, window: int, pools: bool) -> Tensor:
    """A block's attention with every pair of tokens of the padded picture, those of other windows masked out."""
    h, w = x.shape[:2]
    side = window or h
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    rows, columns = x.shape[:2]
    where = (torch.arange(rows)[:, None] // side) * 1000 + torch.arange(columns)[None] // side
    q, k, v = (x @ state[f"{name}.qkv.weight"].T + state[f"{name}.qkv.bias"]).chunk(3, -1)
    of_query = where
    if pools:
        q = torch.stack([q[i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
        of_query, h, w = where[::2, ::2], h // 2, w // 2
    shape, dim = q.shape[:2], q.shape[-1] // heads
    q, k, v = (t.reshape(-1, heads, dim) for t in (q, k, v))
    apart = of_query.reshape(-1, 1) != where.reshape(1, -1)
    found = []
    for head in range(heads):
        scores = (q[:, head] @ k[:, head].T / math.sqrt(dim)).masked_fill(apart, -math.inf)
        found.append(scores.softmax(-1) @ v[:, head])
    y = torch.cat(found, -1) @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]
    return y.reshape(*shape, -1)[:h, :w]


def plain_encoder(pixels: Tensor, state: dict[str, Tensor], config: Sam2Config) -> list[Tensor]:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    trunk = "image_encoder.trunk"
    proj = f"{trunk}.patch_embed.proj"
    x = F.conv2d(pixels, state[f"{proj}.weight"], state[f"{proj}.bias"], stride=4, padding=3)[0].permute(1, 2, 0)
    side = x.shape[0]
    background = F.interpolate(state[f"{trunk}.pos_embed"], (side, side), mode="bicubic")[0]
    window = state[f"{trunk}.pos_embed_window"][0]
    place = torch.arange(side) % window.shape[1]
    x = x + (background + window[:, place][:, :, place]).permute(1, 2, 0)
    stages, number = [], 0
    for stage, count in enumerate(config.stages):
        for first in [True] + [False] * (count - 1):
            pools = first and stage > 0
            name = f"{trunk}.blocks.{number}"
            size = 0 if number in config.global_blocks else config.windows[stage - pools]
            normed = norm(x, f"{name}.norm1")
            if pools:
                x = linear(normed, f"{name}.proj")
                x = torch.stack([x[i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
            x = x + attend(normed, state, f"{name}.attn", config.heads << stage, size, pools)
            hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.layers.0")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(hidden, f"{name}.mlp.layers.1")
            number += 1
        stages.append(x)
    lateral = []
    for stage, x in enumerate(stages):
        name = f"image_encoder.neck.convs.{3 - stage}.conv"
        lateral.append(torch.einsum("hwc,oc->ohw", x, state[f"{name}.weight"][:, :, 0, 0])
                       + state[f"{name}.bias"][:, None, None])  # fmt: skip
    embedding = lateral[2] + lateral[3].repeat_interleave(2, 1).repeat_interleave(2, 2)
    finer = [torch.einsum("chw,oc->ohw", x, state[f"sam_mask_decoder.{c}.weight"][:, :, 0, 0])
             + state[f"sam_mask_decoder.{c}.bias"][:, None, None]
             for x, c in zip(lateral[:2], ("conv_s0", "conv_s1"), strict=True)]  # fmt: skip
    return [embedding + state["no_mem_embed"].view(-1, 1, 1), *finer]


@torch.inference_mode()
def test_the_encoder_is_its_definition() -> None:
    made = network()
    state = made.state_dict()
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    plain = plain_encoder(pixels[1:].double(), {k: v.double() for k, v in state.items()}, SMALL)
    for recompute in (False, True):
        found = made.encode(pixels, recompute=recompute)
        for mine, slow in zip(found, plain, strict=True):
            assert mine.dtype == torch.float32
            assert float((mine[1] - slow).abs().max() / slow.abs().max()) < 1e-5
    made.image_encoder.to(torch.bfloat16)
    for mine, slow in zip(made.encode(pixels.bfloat16()), plain, strict=True):
        assert mine.dtype == torch.float32
        assert F.cosine_similarity(mine[1].flatten().double(), slow.flatten(), dim=0) > 0.999
