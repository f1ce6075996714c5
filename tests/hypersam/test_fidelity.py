from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from hypersam.fidelity import YARDSTICKS, Yardstick, compare, rounded, rtn
from hypersam.sam.detect import detect
from hypersam.sam.families.sam_vit import SamViT
from hypersam.sam.model import SamModel
from hypersam.sam.network import sharing
from tests.models import TINY, official_sam


@pytest.fixture(scope="module")
def network() -> SamViT:
    tensors = official_sam(TINY).state_dict()
    tensors = {k: v for k, v in tensors.items() if k not in ("pixel_mean", "pixel_std")}
    return sharing(SamViT, detect(tensors).config, tensors)


def noisy(network: SamViT, relative: float) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {k: v + relative * v.std(correction=0) * torch.randn(v.shape, generator=draw)
            for k, v in network.state_dict().items()}  # fmt: skip


def test_a_model_agrees_with_itself_and_less_with_worse_ones(network):
    told: list[tuple[int, int]] = []
    report = compare(
        network,
        {"same": network, "near": noisy(network, 0.003), "far": lambda: noisy(network, 0.3)},
        scenes=2, sizes={"near": 1000}, progress=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert list(report.models) == ["same", "near", "far", "int8", "int4"]
    same, near, far = (report.models[name] for name in ("same", "near", "far"))
    assert (same.mask_iou, same.worst_tenth) == (1, 1)
    assert same.embedding_cosine == pytest.approx(1)
    assert 1 >= near.mask_iou > far.mask_iou
    assert near.embedding_cosine > far.embedding_cosine
    assert near.worst_tenth <= near.mask_iou
    assert near.nbytes == 1000
    assert same.nbytes is None
    int8, int4 = report.models["int8"], report.models["int4"]
    assert int8.embedding_cosine > int4.embedding_cosine
    assert int8.ratio < int4.ratio
    assert told == [(i, 12) for i in range(1, 13)]
    assert report.prompts > 4
    assert report.side == report.full_side == 64
    json.dumps(report.as_dict())


def test_models_are_let_go_one_by_one(network):
    alive: list[weakref.ref] = []

    def make() -> SamModel:
        gc.collect()
        assert not any(ref() for ref in alive)
        other = sharing(SamViT, network.config, noisy(network, 0.1))
        alive.append(weakref.ref(other))
        return SamModel(other, variant="sam_vit", device=torch.device("cpu"), dtype=torch.float32)

    report = compare(network, {"a": make, "b": make}, scenes=1, side=32, yardsticks={})
    assert report.models["a"] == report.models["b"]
    assert (report.side, report.full_side) == (32, 64)


def test_a_name_is_used_once(network):
    with pytest.raises(ValueError, match="int8"):
        compare(network, {"int8": network})


@pytest.mark.parametrize("group", [None, 8, 5, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_to_nearest(bits, group):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 4, 2, generator=draw) + 0.1
    weight[0] = 0
    got, each = rtn(weight, bits, group)
    assert got.shape == weight.shape
    assert torch.equal(got[0], weight[0])
    groups = 1 if group is None else -(-24 // group)
    assert each == pytest.approx(bits + (16 if group is None else 16 + bits) * groups / 24)
    spread = weight.reshape(6, -1).abs().amax(1) * (1 if group is None else 2)
    step = spread / (2 ** (bits - 1) - 1 if group is None else 2**bits - 1)
    # Half a step for the value, half for the zero point, and fp16's rounding of the scale over all levels.
    assert ((got - weight).reshape(6, -1).abs().amax(1) <= 1.01 * step + 2.0**-11 * spread).all()
    for row in got.reshape(6, -1):
        part = row if group is None else row[:group]
        assert len(part.unique()) <= 2**bits


def test_yardsticks_round_layers_halve_the_rest_and_count_their_bits(network):
    state, nbytes = rounded(network, YARDSTICKS["int8"])
    own = network.state_dict()
    buffers = {name for name, _ in network.named_buffers()}
    rest = {name for name in own if name not in buffers and torch.equal(state[name], own[name].half().float())}
    layers = set(own) - rest - buffers
    assert "image_encoder.blocks.0.attn.qkv.weight" in layers
    assert "image_encoder.neck.0.weight" in layers
    assert "image_encoder.pos_embed" in rest
    assert all(torch.equal(own[name], state[name]) for name in buffers)
    count = {kind: sum(own[name].numel() for name in names)
             for kind, names in (("layers", layers), ("rest", rest), ("buffers", buffers))}  # fmt: skip
    plain = count["layers"] + 2 * count["rest"] + 4 * count["buffers"]
    assert plain < nbytes < 1.1 * plain
    assert rounded(network, Yardstick(4, 128))[1] < nbytes
    huge = sharing(SamViT, network.config, own | {"image_encoder.pos_embed": 1e6 * own["image_encoder.pos_embed"]})
    assert rounded(huge, YARDSTICKS["int8"])[1] == nbytes + 2 * huge.image_encoder.pos_embed.numel()
