"""EdgeSAM's backbone beside timm's RepViT-M1 of the same layout: the same weights, the same picture.

timm's stages keep the block before each halving with the halving itself, under keys of their own.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.random_sam import layout, spread_like
from hypersam.sam.detect import detect
from hypersam.sam.families.edge_sam import EdgeSam
from tests.oracles.official import package

STEM = (("conv1.", "0."), ("conv2.", "2."))
BLOCK = (("token_mixer.", "token_mixer.0."), ("se.", "token_mixer.1."),
         ("channel_mixer.conv1.", "channel_mixer.m.0."), ("channel_mixer.conv2.", "channel_mixer.m.2."))  # fmt: skip
HALVING = (("spatial_downsample.", "token_mixer.0."), ("channel_downsample.", "token_mixer.2."),
           ("ffn.conv1.", "channel_mixer.m.0."), ("ffn.conv2.", "channel_mixer.m.2."))  # fmt: skip


def test_the_backbone_is_repvit_m1() -> None:
    timm = package("timm")
    theirs = timm.create_model("repvit_m1", pretrained=False).double().eval()
    parts: list[tuple[nn.Module, tuple[tuple[str, str], ...]]] = [(theirs.stem, STEM)]
    for stage in theirs.stages:
        if not isinstance(stage.downsample, nn.Identity):
            parts += [(stage.downsample.pre_block, BLOCK), (stage.downsample, HALVING)]
        parts += [(block, BLOCK) for block in stage.blocks]
    mine = EdgeSam(detect(layout("edge")).config).double().eval()
    mine.load_state_dict(spread_like(mine, seed=0))
    features = mine.image_encoder.features
    assert len(features) == len(parts)
    for ours, (part, names) in zip(features, parts, strict=True):
        state = ours.state_dict()
        wanted = {}
        for key in part.state_dict():
            prefix, name = next(((a, b) for a, b in names if key.startswith(a)), ("", ""))
            if prefix:
                wanted[key] = state.pop(name + key.removeprefix(prefix))
        assert not state, "every tensor has its like"
        part.load_state_dict(wanted, strict=False)
    pixels = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    with torch.inference_mode():
        want = theirs.stages(theirs.stem(pixels))
        got = pixels
        for block in features:
            got = block(got)
    assert got.shape == want.shape == (2, 384, 4, 4)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-11
