"""The reordered mask decoder against segment-anything's own classes in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder as OfficialDecoder
from segment_anything.modeling import PromptEncoder as OfficialEncoder
from segment_anything.modeling import TwoWayTransformer as OfficialTransformer
from torch import Tensor, nn

import hypersam
from benchmarks import random_sam
from hypersam.errors import PromptError
from hypersam.sam.families import mask_decoder as ours
from hypersam.sam.families.decoder import DecoderConfig, mask_decoder, prompt_encoder
from hypersam.sam.families.efficient_sam import EfficientSam
from hypersam.sam.families.sam2 import Sam2
from hypersam.sam.families.sam_hq import SamHq
from hypersam.sam.families.sam_vit import SamViT
from hypersam.sam.network import Features, Prompts, SamNetwork
from kernels.codec import BirkhoffConfig, Coded, encode, lattice, orbit
from kernels.hyperlinear import HyperLinear
from tests.hypersam import test_efficient_sam, test_sam2, test_tiny_vit
from tests.models import save_checkpoint

DIM, GRID = 128, 12
MOST = 10 - 5
"""Tokens of a prompt up to which its projections are on the tokens' side, beside the decoder's own five."""
CONFIG = DecoderConfig(DIM, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=96, iou_depth=3, iou_hidden=32)


def pair() -> tuple[ours.MaskDecoder, OfficialDecoder]:
    """Our decoder in fp32 and the official one in float64, of the same weights, biases among them."""
    torch.manual_seed(3)
    made = mask_decoder(CONFIG).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    official = OfficialDecoder(
        transformer_dim=DIM, transformer=OfficialTransformer(2, DIM, 8, 96), iou_head_hidden_dim=32
    )
    official.load_state_dict(made.state_dict())
    return made, official.double().eval()


def question(prompts: int, tokens: int, *, masked: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(prompts + tokens)
    dense = torch.randn(prompts if masked else 1, DIM, GRID if masked else 1, GRID if masked else 1, generator=draw)
    return {
        "embedding": torch.randn(1, DIM, GRID, GRID, generator=draw),
        "positions": torch.randn(1, GRID**2, DIM, generator=draw),
        "sparse": torch.randn(prompts, tokens, DIM, generator=draw),
        "dense": dense.expand(-1, -1, GRID, GRID),
    }


def expected(official: OfficialDecoder, asked: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    wide = {name: t.double() for name, t in asked.items()}
    answer: tuple[Tensor, Tensor] = official.predict_masks(
        image_embeddings=wide["embedding"],
        image_pe=wide["positions"].transpose(1, 2).unflatten(2, (GRID, GRID)),
        sparse_prompt_embeddings=wide["sparse"],
        dense_prompt_embeddings=wide["dense"].expand(len(wide["sparse"]), -1, -1, -1),
    )
    return answer


def off(found: Tensor, true: Tensor) -> float:
    """Largest difference over largest magnitude."""
    return float((found.detach().double() - true.detach()).abs().max() / true.detach().abs().max())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, MOST, MOST + 1, 40])
@pytest.mark.parametrize("prompts", [1, 5])
def test_the_masks_are_the_official_ones(prompts: int, tokens: int, masked: bool) -> None:
    made, official = pair()
    asked = question(prompts, tokens, masked=masked)
    masks, iou = expected(official, asked)
    for which in (slice(None), slice(1), slice(1, None)):
        found, score = made.masks(**asked, which=which)
        assert found.shape == masks[:, which].shape
        assert off(found, masks[:, which]) < 1e-5
        assert off(score, iou[:, which]) < 1e-5


def test_both_orders_of_the_products_are_taken() -> None:
    attention = pair()[0].transformer.final_attn_token_to_image
    assert ours._few(torch.empty(1, 5 + MOST, DIM), attention, 8)
    assert not ours._few(torch.empty(1, 6 + MOST, DIM), attention, 8)


def test_channels_last_embeddings_change_nothing() -> None:
    made, _ = pair()
    asked = question(2, 2, masked=False)
    plain, _ = made.masks(**asked, which=slice(None))
    asked["embedding"] = asked["embedding"].to(memory_format=torch.channels_last)
    torch.testing.assert_close(made.masks(**asked, which=slice(None))[0], plain)


@pytest.mark.parametrize("tokens", [2, MOST + 1])
def test_gradients_are_the_official_ones(tokens: int) -> None:
    made, official = pair()
    asked = question(3, tokens, masked=False)
    made.requires_grad_(True)
    official.requires_grad_(True)
    made.masks(**asked, which=slice(None))[0].square().mean().backward()
    expected(official, asked)[0].square().mean().backward()
    theirs = dict(official.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in made.named_parameters():
        wanted = theirs[name].grad
        if wanted is None:
            assert parameter.grad is None
            continue
        # Theirs is what rounding leaves: the bias moves all scores of a token alike.
        assert parameter.grad is not None or name.endswith("token_to_image.k_proj.bias"), name
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert float((found.double() - wanted).abs().max()) < 1e-5 * largest, name


def coded(weight: Tensor, kind: str) -> Coded:
    if kind == "birkhoff":
        found = encode(weight, BirkhoffConfig(min_elements=1, raw_above=1.0), by_row=True)
        assert isinstance(found, Coded)
        return found
    if kind.startswith("orbit"):
        return orbit.encode(weight, 4, columns=weight.shape[1], rotate=kind == "orbit rotated")
    return lattice.encode(weight, 0.01, columns=weight.shape[1])


@pytest.mark.parametrize("kind", ["lattice", "lattice stream", "orbit", "orbit rotated", "birkhoff"])
def test_compressed_layers_answer_as_what_they_decode_to(kind: str) -> None:
    made, _ = pair()
    dense = copy.deepcopy(made)
    for name, layer in list(made.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        compressed = HyperLinear.from_encoded(coded(layer.weight, kind), layer.bias, stream=kind.endswith("stream"))
        parent, _, own = name.rpartition(".")
        setattr(made.get_submodule(parent), own, compressed)
        dense.get_submodule(name).weight.copy_(compressed.dense())
    asked = question(2, 3, masked=False)
    found, score = made.masks(**asked, which=slice(None))
    masks, iou = dense.masks(**asked, which=slice(None))
    assert off(found, masks.double()) < 1e-5
    assert off(score, iou.double()) < 1e-5


WIDE = DecoderConfig(DIM, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=64, iou_depth=3, iou_hidden=32)
FAMILIES: dict[str, tuple[type[SamNetwork], Any]] = {
    "sam_vit": (SamViT, replace(test_tiny_vit.VIT, decoder=WIDE)),
    "sam_hq_vit": (SamHq, replace(test_tiny_vit.VIT, decoder=WIDE)),
    "sam2_hiera": (Sam2, replace(test_sam2.SMALL, decoder=WIDE)),
    "efficient_sam": (EfficientSam, replace(test_efficient_sam.SMALL, dim=256)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_alike_in_both_orders(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, config = FAMILIES[family]
    made = network(config).eval().requires_grad_(False)
    made.load_state_dict(random_sam.spread(network, config, seed=2))
    side = config.image_size
    features = made.encode(torch.randn(1, 3, side, side))
    assert made.remembered_bytes() == 4 * features[0].numel()
    few = ours._few
    for prompts in (
        Prompts((torch.rand(3, 1, 2) * side, torch.ones(3, 1))),
        Prompts(boxes=torch.tensor([[0.1, 0.1, 0.8, 0.7], [0.2, 0.3, 0.9, 0.9]]) * side),
    ):
        found = []
        for forced in (False, True):
            taken: list[bool] = []

            def order(*given: Any, forced: bool = forced, taken: list[bool] = taken) -> bool:
                taken.append(few(*given) and not forced)
                return taken[-1]

            monkeypatch.setattr(ours, "_few", order)
            found.append([*made.every_mask(features, prompts), *made.decode(features, prompts, multimask=True)])
            assert set(taken) == {not forced}
        for one, other in zip(*found, strict=True):
            assert off(one, other.double()) < 1e-4


def test_blocks_of_pixels_are_transposed_convolutions() -> None:
    torch.manual_seed(0)
    first, second = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 3, 2, stride=2)
    pixels = torch.randn(2, 25, 8)
    up = ours.doubled(second, F.gelu(ours.doubled(first, pixels)))
    true = second(F.gelu(first(pixels.transpose(1, 2).unflatten(2, (5, 5)))))
    torch.testing.assert_close(ours.in_place(up.transpose(1, 2)), true)


def test_positions_are_remembered_until_the_size_changes() -> None:
    encoder = prompt_encoder(CONFIG, grid=GRID, image_size=16 * GRID)
    official = OfficialEncoder(DIM, (GRID, GRID), (16 * GRID, 16 * GRID), 16)
    official.load_state_dict(encoder.state_dict())
    first = encoder.positions()
    torch.testing.assert_close(first, official.get_dense_pe().flatten(2).transpose(1, 2))
    assert encoder.positions() is first
    encoder.image_embedding_size = (6, 6)
    assert encoder.positions().shape == (1, 36, DIM)
    other = prompt_encoder(CONFIG, grid=6, image_size=96)
    encoder.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(encoder.positions(), other.positions())


def test_positions_are_forgotten_with_the_weights_and_counted() -> None:
    encoder = prompt_encoder(CONFIG, grid=GRID, image_size=16 * GRID)
    encoder.positions()
    other = prompt_encoder(CONFIG, grid=GRID, image_size=16 * GRID)
    encoder.load_state_dict(other.state_dict())
    torch.testing.assert_close(encoder.positions(), other.positions())
    assert encoder.positions_bytes == encoder.positions().nbytes


def test_the_official_way_to_ask_is_refused() -> None:
    made, _ = pair()
    with pytest.raises(NotImplementedError, match="masks"):
        made.predict_masks()


def test_a_part_of_the_prompts() -> None:
    points = torch.rand(5, 2, 2), torch.ones(5, 2)
    prompts = Prompts(points, torch.rand(5, 4), torch.rand(5, 1, 8, 8))
    some = prompts[1:3]
    assert (prompts.count, some.count) == (5, 2)
    assert some.points is not None
    assert some.boxes is not None
    assert some.masks is not None
    torch.testing.assert_close(some.points[0], points[0][1:3])
    assert Prompts(boxes=torch.rand(3, 4))[2:].count == 1
    assert Prompts().count == 1
    with pytest.raises(ValueError, match="of 2, 3 prompts"):
        _ = Prompts(boxes=torch.rand(3, 4), masks=torch.rand(2, 1, 8, 8)).count


def test_prompts_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    predictor = hypersam.load(save_checkpoint(tmp_path / "tiny.pth"))
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    points, labels = torch.rand(7, 2, 2) * 60, torch.ones(7, 2, dtype=torch.int)
    boxes, masks = torch.tensor([[4.0, 4.0, 50.0, 30.0]]).expand(7, -1) + torch.rand(7, 1), torch.randn(7, 1, 32, 32)
    asked = [(points, labels, None, None), (None, None, boxes, None), (points, labels, boxes, masks),
             (points, labels, None, masks[:1])]  # fmt: skip
    whole = [predictor.predict_torch(*each, return_logits=True) for each in asked]
    decode, sizes = predictor.model.network.decode, list[int]()

    def counted(features: Features, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        sizes.append(prompts.count)
        return decode(features, prompts, multimask=multimask)

    monkeypatch.setattr(predictor.model.network, "decode", counted)
    monkeypatch.setattr("hypersam.sam.model._IN_CACHE", 3 * 32 * 8 * 8 // torch.get_num_threads() + 1)
    for each, true in zip(asked, whole, strict=True):
        sizes.clear()
        for found, expected in zip(predictor.predict_torch(*each, return_logits=True), true, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert sizes == [3, 3, 1]
    for wrong in ((points, labels, boxes[:2], None), (points, labels[:1], None, None), (None, None, boxes[:0], None)):
        with pytest.raises(PromptError):
            predictor.predict_torch(*wrong)
    assert predictor.predict()[0].shape == (3, 40, 60)  # as segment-anything answers to nothing
